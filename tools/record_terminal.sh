#!/bin/bash
# Records docs/terminal-session.txt: a conversation with the demo model in tmux, as the screen shows it.
# From the root of the project, after make run: tools/record_terminal.sh > docs/terminal-session.txt
set -eu
bin=$(realpath "${BIN:-.venv/bin}")
folder=$(mktemp -d)
tm() { tmux -L "pyengine-record-$$" "$@"; }
trap 'tm kill-server 2>/dev/null; rm -rf "$folder"' EXIT
cd "$folder"
for i in $(seq 1100); do echo "line $i: the quick brown fox counts $((i * 7))"; done > long.txt

tm -f /dev/null new-session -d -x 80 -y 24 \
  "env PS1='\$ ' PATH=$bin:$PATH XDG_STATE_HOME=$folder/state LC_ALL=C.UTF-8 bash --norc --noprofile"
tm set -g history-limit 10000
tm set -g status off

# The last line of the screen that holds anything.
last() { tm capture-pane -p | grep . | tail -1; }
wait_for() { # PATTERN: in the last line, for at most 30 s
  for _ in $(seq 600); do last | grep -qE -- "$1" && return; sleep 0.05; done
  echo "'$1' did not come; the screen is:" >&2; tm capture-pane -p >&2; exit 1
}
say() { tm send-keys -l -- "$1"; tm send-keys Enter; sleep 0.3; wait_for "${2:-^>>>\$}"; }
shot() { # TITLE [LINES]: what the screen and its history show, or the last lines of it
  echo "---- $1"; echo
  tm capture-pane -p -S - | sed -e 's/ *$//' -e :a -e '/^\n*$/{$d;N;ba' -e '}' | tail -n "${2:-+1}"
  echo
}

wait_for '^\$$'
say "pyengine-run --demo -c 32768 --seed 1"
say "What is 27 + 58?"
say "And what is 5 times 7?"
say "/stats"
shot "Two turns: reasoning is folded, the second turn evaluates only what is new"
tm load-buffer long.txt
tm paste-buffer -p
wait_for 'lines\]$'
tm send-keys Enter
wait_for '^reading .* left'
sleep 1
shot "A long prompt is being read" 2
tm send-keys C-c
wait_for '^>>>$'
say "What is 12 + 30?"
say "/save talk.chat"
say "/bye" '^\$$'
say "pyengine-run --demo -c 32768 --seed 1"
say "/load talk.chat"
say "And 6 times 7?"
say "/stats"
say "/think"
say "/bye" '^\$$'
shot "All of it: Ctrl-C left a usable chat; it was saved, left, and gone on with"
