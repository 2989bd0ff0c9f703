"""Measures the demo model through pyengine: exact answers, decoded greedily, of GGUF files of any type.

The held-out exam, or the questions of a file:

    python tools/demo/evaluate.py demo-F16.gguf demo-Q4_0.gguf
    python tools/demo/evaluate.py demo-F16.gguf --problems tools/demo/word_problems.tsv --verbose
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from problems import extract_answer, held_out
from pyengine import Model, Session
from pyengine.chat import ChatTemplate, build_prompt

CONTEXT = 1024  # tokens, as the model was trained


def read_problems(path: Path) -> list[tuple[str, int]]:
    """(question, answer) of lines `answer <tab> question`."""
    rows = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(question, int(answer)) for answer, question in rows]


def reply(model: Model, session: Session, template: ChatTemplate, question: str, limit: int) -> str:
    """The greedy reply, reasoning included; it is cut after `limit` tokens."""
    prompt = build_prompt(template, model.tokenizer, [{"role": "user", "content": question}]).ids
    logits = session.eval(prompt[session.reuse(prompt) :])
    out: list[int] = []
    while len(out) < limit and (token := int(np.argmax(logits))) not in model.tokenizer.eog_ids:
        out.append(token)
        logits = session.eval([token])
    # The template opens the reasoning, so a reply that never closes it holds no answer.
    return model.tokenizer.decode(out)


def mistakes(path: Path, problems: list[tuple[str, int]], limit: int, threads: int) -> list[str]:
    """One line for each wrong answer."""
    wrong = []
    with Model.open(path) as model, model.session(n_ctx=CONTEXT, threads=threads) as session:
        template = ChatTemplate.from_metadata(model.metadata, model.tokenizer)
        for question, answer in problems:
            text = reply(model, session, template, question, limit)
            if extract_answer(text) != answer:
                wrong.append(f"  {question!r}: expected {answer}, got {text!r}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--count", type=int, default=200, help="number of held-out problems (default: %(default)s)")
    parser.add_argument("--problems", type=Path, metavar="FILE.tsv", help="these, instead of the held-out ones")
    parser.add_argument("--limit", type=int, default=300, help="tokens of a reply at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="print the mistakes")
    args = parser.parse_args()
    exam = [(p.question, p.answer) for p in held_out(args.count)]
    problems = read_problems(args.problems) if args.problems else exam
    for path in args.models:
        wrong = mistakes(path, problems, args.limit, args.threads)
        right = len(problems) - len(wrong)
        print(f"{path.name}: {right} of {len(problems)} exact ({right / len(problems):.1%})", flush=True)
        if args.verbose:
            print(*wrong, sep="\n")


if __name__ == "__main__":
    main()
