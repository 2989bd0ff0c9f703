/* A host in C: starts pyengine-run --stream-json as a child process, asks one question, prints the answer as it comes.
 *
 *   cc -std=c99 -D_POSIX_C_SOURCE=200809L stream_host.c -o stream_host
 *   ./stream_host "Why is the sky blue?" pyengine-run model.gguf
 *
 * docs/stream.md describes the protocol. A real host has a JSON library; the few lines here read what they need. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Writes text as a JSON string. */
static void put_string(FILE* out, const char* text) {
  fputc('"', out);
  for (; *text; ++text) {
    if (*text == '"' || *text == '\\')
      fprintf(out, "\\%c", *text);
    else if ((unsigned char)*text < 0x20)
      fprintf(out, "\\u%04x", (unsigned)*text);
    else
      fputc(*text, out);
  }
  fputc('"', out);
}

static void put_utf8(FILE* out, unsigned long c) {
  if (c < 0x80) {
    fputc((int)c, out);
  } else if (c < 0x800) {
    fprintf(out, "%c%c", (int)(0xc0 | c >> 6), (int)(0x80 | (c & 0x3f)));
  } else if (c < 0x10000) {
    fprintf(out, "%c%c%c", (int)(0xe0 | c >> 12), (int)(0x80 | (c >> 6 & 0x3f)), (int)(0x80 | (c & 0x3f)));
  }
}

/* The value of a member whose value is a string, still with its escapes; NULL when there is none. An event's own members
 * come before the text that a model wrote, so the first match is the right one; quotes inside text are escaped. */
static const char* member(const char* line, const char* name) {
  char key[32];
  const char* at;
  snprintf(key, sizeof key, "\"%s\":\"", name);
  at = strstr(line, key);
  return at ? at + strlen(key) : NULL;
}

static int is(const char* line, const char* name, const char* value) {
  const char* at = member(line, name);
  return at && strncmp(at, value, strlen(value)) == 0 && at[strlen(value)] == '"';
}

/* Prints a JSON string up to its closing quote. The engine escapes only what JSON and lines need. */
static void print_unescaped(FILE* out, const char* s) {
  for (; *s && *s != '"'; ++s) {
    char code[5] = {0};
    if (*s != '\\') {
      fputc(*s, out);
      continue;
    }
    switch (*++s) {
      case 'n': fputc('\n', out); break;
      case 't': fputc('\t', out); break;
      case 'r': fputc('\r', out); break;
      case 'b': fputc('\b', out); break;
      case 'f': fputc('\f', out); break;
      case 'u':
        strncpy(code, s + 1, 4);
        put_utf8(out, strtoul(code, NULL, 16));
        s += strlen(code);
        break;
      case '\0': return;
      default: fputc(*s, out);
    }
  }
}

/* Starts argv with both ends of its standard streams here. */
static pid_t start(char** argv, FILE** to, FILE** from) {
  int in[2], out[2];
  pid_t child;
  if (pipe(in) || pipe(out)) return -1;
  child = fork();
  if (child == 0) {
    dup2(in[0], 0);
    dup2(out[1], 1);
    close(in[0]), close(in[1]), close(out[0]), close(out[1]);
    execvp(argv[0], argv);
    fprintf(stderr, "%s: %s\n", argv[0], strerror(errno));
    _exit(127);
  }
  close(in[0]), close(out[1]);
  *to = fdopen(in[1], "w");
  *from = fdopen(out[0], "r");
  return child;
}

int main(int argc, char** argv) {
  FILE *to, *from;
  char* line = NULL;
  size_t size = 0;
  char** command;
  pid_t child;
  int status, answered = 0;

  if (argc < 3) {
    fprintf(stderr, "usage: %s QUESTION pyengine-run [OPTIONS] MODEL\n", argv[0]);
    return 2;
  }
  signal(SIGPIPE, SIG_IGN); /* a child that died is noticed when reading */
  command = (char**)calloc((size_t)argc, sizeof *command);
  if (!command) return 1;
  memcpy(command, argv + 2, (size_t)(argc - 2) * sizeof *command);
  command[argc - 2] = "--stream-json";
  child = start(command, &to, &from);
  if (child < 0 || !to || !from) return 1;

  while (getline(&line, &size, from) > 0) {
    if (is(line, "event", "hello")) { /* the model is open: ask */
      fputs("{\"request\":\"generate\",\"id\":\"1\",\"messages\":[{\"role\":\"user\",\"content\":", to);
      put_string(to, argv[1]);
      fputs("}]}\n", to);
      fflush(to);
    } else if (is(line, "event", "text")) {
      print_unescaped(stdout, member(line, "text"));
      fflush(stdout);
    } else if (is(line, "event", "error")) {
      fprintf(stderr, "%s", line);
      break;
    } else if (is(line, "event", "end")) {
      answered = 1;
      putchar('\n');
      break;
    }
  }
  fclose(to); /* which ends the engine */
  while (getline(&line, &size, from) > 0) continue;
  fclose(from);
  waitpid(child, &status, 0);
  free(line), free(command);
  return answered ? 0 : 1;
}
