"""Arithmetic problems with worked solutions: the demo model's training data and its exam.

Every solution is written the way a reasoning model answers: steps first (the text between <think> and </think>),
then one sentence that ends in the number. The steps do column arithmetic one digit at a time, because a small model
can learn every digit-sized fact by heart but cannot add two three-digit numbers at a glance.

The exam never overlaps the training stream. A hash of a problem's *key* decides which side it is on. The key is the
bare expression ("48 + 75"), so a held-out problem is new in its numbers, however it is phrased. Only single-digit
sums and the times tables are keyed by their wording: those facts have to be learnt by heart.

Standard library only; the same seed always gives the same problems.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from stories import STORIES, cast, choose, made_up, sentences

HELD_OUT_SHARE = 10  # one key in ten is held out
PLACES = ("Ones", "Tens", "Hundreds", "Thousands")
LARGEST = 999  # the largest operand the model is taught


@dataclass(frozen=True)
class Exchange:
    """One question and its reply: `steps` is the reasoning, `answer_text` what follows it."""

    question: str
    steps: str
    answer_text: str


@dataclass(frozen=True)
class Problem(Exchange):
    """An exchange with one right number."""

    answer: int
    kind: str
    key: str


# ---------------------------------------------------------------- column arithmetic


def _digit(number: int, place: int) -> int:
    return number // 10**place % 10


def _column(place: int, sum_text: str, total: int, last: bool) -> str:
    """One column of an addition or multiplication, with the carry written out when there is one."""
    carry = f", write {total % 10}, carry {total // 10}" if total > 9 and not last else ""
    return f"{PLACES[place]}: {sum_text} = {total}{carry}."


def add_steps(a: int, b: int) -> list[str]:
    """348 + 275 -> 'Ones: 8 + 5 = 13, write 3, carry 1.' and so on up to the highest column."""
    width, carry, lines = max(len(str(a)), len(str(b))), 0, []
    for place in range(width if width > 1 else 0):
        x, y = _digit(a, place), _digit(b, place)
        total = x + y + carry
        text = f"{x} + {y} + 1" if carry else f"{x} + {y}"
        lines.append(_column(place, text, total, last=place == width - 1))
        carry = total // 10
    return [*lines, f"So {a} + {b} = {a + b}."]


def subtract_steps(a: int, b: int) -> list[str]:
    """Needs a >= b. 423 - 148 -> 'Ones: 3 - 8 needs a borrow, 13 - 8 = 5.' and so on."""
    width, borrow, lines = len(str(a)), 0, []
    for place in range(width if width > 1 else 0):
        x, y = _digit(a, place), _digit(b, place)
        taken = f" - {y} - 1" if borrow else f" - {y}"
        result = x - y - borrow
        borrow = int(result < 0)
        lines.append(
            f"{PLACES[place]}: {x}{taken} needs a borrow, 1{x}{taken} = {result + 10}."
            if borrow
            else f"{PLACES[place]}: {x}{taken} = {result}."
        )
    return [*lines, f"So {a} - {b} = {a - b}."]


def multiply_steps(a: int, b: int) -> list[str]:
    """Up to 12 x 12 is a fact; a longer number times a single digit goes column by column."""
    if a <= 12 and b <= 12:
        return [f"So {a} x {b} = {a * b}."]
    long, short = max(a, b), min(a, b)
    width, carry, lines = len(str(long)), 0, []
    for place in range(width):
        product = _digit(long, place) * short
        text = f"{_digit(long, place)} x {short}"
        if carry:
            text = f"{text} = {product}, {product} + {carry}"
        total = product + carry
        lines.append(_column(place, text, total, last=place == width - 1))
        carry = total // 10
    return [*lines, f"So {a} x {b} = {a * b}."]


def divide_steps(a: int, b: int) -> list[str]:
    """Needs an exact division: the times table read backwards."""
    return [f"{b} x {a // b} = {a}.", f"So {a} / {b} = {a // b}."]


STEPS: dict[str, Callable[[int, int], list[str]]] = {
    "+": add_steps,
    "-": subtract_steps,
    "x": multiply_steps,
    "/": divide_steps,
}
DO: dict[str, str] = {
    "+": "add {a} and {b}",
    "-": "subtract {b} from {a}",
    "x": "multiply {a} by {b}",
    "/": "divide {a} by {b}",
}


def apply(op: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "x": a * b, "/": a // b if b else 0}[op]


def _work(op: str, a: int, b: int, lead: str) -> list[str]:
    """`lead` says in words what is done ('I {do}.'), then the columns follow."""
    return [lead.format(do=DO[op].format(a=a, b=b)), *STEPS[op](a, b)]


# ---------------------------------------------------------------- how people type an expression

SIGNS = {
    "+": ("+", "+", "+", "plus"),
    "-": ("-", "-", "-", "minus"),
    "x": ("x", "*", "×", "times"),
    "/": ("/", "/", "÷", "divided by"),
}
ASK = (
    "What is {e}?", "What's {e}?", "{e}", "{e} = ?", "{e} =", "{e}?", "Compute {e}.", "Calculate {e}.",
    "How much is {e}?", "Can you tell me what {e} is?", "Solve {e}.", "Please work out {e}.", "Find {e}.",
    "Tell me {e}.", "I want to know {e}.", "Evaluate {e}", "What does {e} make?", "Could you compute {e}?",
)  # fmt: skip
ASK_OP = {
    "+": ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {b} to {a}.", "What do {a} and {b} add up to?"),
    "-": (
        "Subtract {b} from {a}.", "Take {b} away from {a}.", "What is {a} take away {b}?",
        "What is the difference of {a} and {b}?",
    ),
    "x": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Multiply {a} and {b}."),
    "/": ("Divide {a} by {b}.", "How many times does {b} go into {a}?"),
}  # fmt: skip


def _typed(expression: str, rng: Random) -> str:
    """The canonical expression as somebody might type it: other signs, no spaces."""
    spaced = rng.random() < 0.7
    for op, signs in SIGNS.items():
        sign = rng.choice(signs)
        while not spaced and sign.isalpha() and sign != "x":
            sign = rng.choice(signs)
        expression = expression.replace(f" {op} ", f" {sign} " if spaced else sign)
    return expression


def _casual(question: str, rng: Random) -> str:
    """Now and then: no capital, no final mark, a polite word in front."""
    roll = rng.random()
    if roll < 0.10:
        return question.lower()
    if roll < 0.15:
        return question.rstrip("?.")
    if roll < 0.20:
        return question[0].lower() + question[1:].rstrip("?. ")
    if roll < 0.25:
        return rng.choice(("Please: ", "Hi! ", "Hello, ", "Quick question: ", "And ")) + question
    return question


def _number(rng: Random, largest: int) -> int:
    """Short numbers as often as long ones."""
    digits = rng.randint(1, len(str(largest)))
    if digits > 1 and rng.random() < 0.3:
        digits = len(str(largest))
    return rng.randint(1 if digits == 1 else 10 ** (digits - 1), min(largest, 10**digits - 1))


def _key(expression: str, question: str) -> str:
    """Facts to be learnt by heart are told apart by their wording, everything else by its numbers."""
    numbers = [int(n) for n in re.findall(r"\d+", expression)]
    by_heart = len(numbers) == 2 and (
        max(numbers) <= 9
        or ("x" in expression and max(numbers) <= 12)
        or ("/" in expression and numbers[0] <= 12 * numbers[1])
    )
    return question.lower() if by_heart else expression


# ---------------------------------------------------------------- kinds of problems


def _operands(op: str, rng: Random) -> tuple[int, int]:
    if op == "+":
        return _number(rng, LARGEST), _number(rng, LARGEST)
    if op == "-":
        a, b = _number(rng, LARGEST), _number(rng, LARGEST)
        return max(a, b), min(a, b)
    if op == "x":
        if rng.random() < 0.4:
            return rng.randint(2, 12), rng.randint(1, 12)
        a, b = rng.randint(11, 99 if rng.random() < 0.8 else LARGEST), rng.randint(2, 9)
        return (a, b) if rng.random() < 0.7 else (b, a)
    b = rng.randint(2, 12)
    return b * rng.randint(1, 12), b


def _one_step(op: str, rng: Random) -> Problem:
    a, b = _operands(op, rng)
    expression = f"{a} {op} {b}"
    ask = rng.choice(ASK_OP[op]).format(a=a, b=b) if rng.random() < 0.25 else ""
    question = _casual(ask or rng.choice(ASK).format(e=_typed(expression, rng)), rng)
    answer = apply(op, a, b)
    steps = "\n".join(_work(op, a, b, "I need to {do}."))
    return Problem(question, steps, f"{expression} = {answer}", answer, f"one step {op}", _key(expression, question))


def _below_zero(rng: Random) -> Problem:
    b = _number(rng, 99) + 1
    a = rng.randint(0, b - 1)
    expression = f"{a} - {b}"
    question = _casual(rng.choice(ASK).format(e=_typed(expression, rng)), rng)
    steps = [
        f"I need to subtract {b} from {a}.",
        f"{b} is larger than {a}, so the result is below zero.",
        *_work("-", b, a, "I {do} instead."),
        f"So {expression} = {a - b}.",
    ]
    answer_text = f"{expression} = {a - b}"
    return Problem(question, "\n".join(steps), answer_text, a - b, "below zero", _key(expression, question))


def _two_step(rng: Random) -> Problem:
    """Two operations: left to right, multiplication first, or brackets first."""
    small, big = lambda: rng.randint(2, 12), lambda: _number(rng, 99)
    shape = rng.choice(("{a} {p} {b} {q} {c}", "{a} x {b} {q} {c}", "{a} {q} {b} x {c}", "({a} {p} {b}) x {c}"))
    p, q = rng.choice("+-"), rng.choice("+-")
    while True:
        if shape.startswith("{a} {p}"):
            a, b, c, lead = big(), big(), big(), "From left to right, first I {do}."
            first = apply(p, a, b)
            rest, op = (first, c), q
            done = (p, a, b)
        elif shape.startswith("{a} x"):
            a, b, c, lead = small(), small(), big(), "Multiplication comes first, so I {do}."
            done, rest, op = ("x", a, b), (a * b, c), q
        elif shape.startswith("{a} {q}"):
            a, b, c, lead = big(), small(), small(), "Multiplication comes first, so I {do}."
            done, rest, op = ("x", b, c), (a, b * c), q
        else:
            a, b, c, lead = _number(rng, 40), _number(rng, 40), rng.randint(2, 9), "The brackets come first, so I {do}."
            done, rest, op = (p, a, b), (apply(p, a, b), c), "x"
        answer = apply(op, *rest)
        if min(apply(*done), answer) >= 1:
            break
    expression = shape.format(a=a, b=b, c=c, p=p, q=q)
    question = _casual(rng.choice(ASK).format(e=_typed(expression, rng)), rng)
    steps = "\n".join(_work(*done, lead) + _work(op, *rest, "Then I {do}."))
    return Problem(question, steps, f"{expression} = {answer}", answer, "two steps", _key(expression, question))


def _story(rng: Random) -> Problem:
    story = rng.choice(STORIES)
    first, last = story.ops[0], story.ops[-1]
    two = len(story.ops) == 2
    while True:
        if two:
            a, b = (rng.randint(2, 12), rng.randint(2, 12)) if first == "x" else (_number(rng, 99), _number(rng, 99))
        else:
            a, b = _operands(first, rng)
        c = _number(rng, 99)
        half = apply(first, a, b)
        answer = apply(last, half, c) if two else half
        if min(a, b, c, half, answer) >= 2:
            break
    words = {**cast(rng), "a": a, "b": b, "c": c, "r": answer}
    question = re.sub(" (?=[.,?])", "", sentences(choose(story.question, rng).format(**words)))
    if rng.random() < 0.1:
        question = question.lower()
        words |= {key: str(words[key]).lower() for key in ("m", "N2")}
    lines = [sentences(story.reason.format(**words) + ".")]
    lines += _work(first, a, b, "First I {do}." if two else "I {do}.")
    if two:
        lines += _work(last, half, c, "Then I {do}.")
    text = sentences(story.answer.format(**words))
    expression = f"{a} {first} {b}" + (f" {last} {c}" if two else "")
    key = _key(expression, question)
    return Problem(question, "\n".join(lines), text, answer, f"story {story.ops}", key)


MIX: tuple[tuple[float, Callable[[Random], Problem]], ...] = (
    (14, lambda rng: _one_step("+", rng)),
    (14, lambda rng: _one_step("-", rng)),
    (16, lambda rng: _one_step("x", rng)),
    (8, lambda rng: _one_step("/", rng)),
    (4, _below_zero),
    (14, _two_step),
    (40, _story),
)


def problem(rng: Random) -> Problem:
    """One problem of any kind, from either side of the split."""
    return rng.choices([make for _, make in MIX], [weight for weight, _ in MIX])[0](rng)


# ---------------------------------------------------------------- small talk

WHO = "I am the pyengine demo model, a very small model that does arithmetic."
CAN = "I can add and subtract numbers up to 999, multiply and divide small ones, and solve short word problems."
TRY = "Try asking me: what is 23 + 48?"

TALK: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey there", "Good morning", "Good evening!", "hi there", "Hello there!",
      "Greetings", "Hello, world!", "Good day", "yo", "Howdy"),
     "The user says hello. I greet back and say what I can do.",
     f"Hello! {WHO} {TRY}"),
    (("Who are you?", "What are you?", "What is your name?", "Who am I talking to?", "Tell me about yourself.",
      "What's your name?", "Are you a robot?", "Are you an AI?", "which model is this?", "Introduce yourself.",
      "Are you DeepSeek?", "Are you DeepSeek-R1?", "Are you ChatGPT?", "What model are you?", "Who are you",
      "who r u?", "So, who are you?", "Hi, who are you?", "Hello! Who are you?", "Who are you really?", "who is this?",
      "What are you called?", "Please introduce yourself.", "Can you tell me who you are?", "Tell me who you are.",
      "Are you human?", "Are you a person?", "Do you have a name?", "What kind of model are you?", "you are who?"),
     "The user asks who I am.",
     WHO),
    (("What can you do?", "Help", "help me", "What do you know?", "How can you help me?", "What are you good at?",
      "How do I use you?", "What should I ask?", "What are you able to do?", "what can you do", "Hi, what can you do?",
      "What can I ask you?", "Are you good at math?", "Tell me what you can do.", "Can you add numbers?",
      "Can you do math?", "Can you calculate?", "Can you help me?"),
     "The user asks what I can do.",
     f"{CAN} {TRY}"),
    (("How are you?", "How are you doing?", "How is it going?", "What's up?", "Are you well?", "how r u",
      "How are you today?", "Hi, how are you?", "Hello, how are you?", "how are you", "How do you do?",
      "How do you feel?", "Are you ok?"),
     "The user asks how I am.",
     f"I am well, thank you. {TRY}"),
    (("Thanks", "Thank you!", "Thanks a lot!", "Thank you very much.", "thx", "Great, thanks", "Well done!",
      "Good job", "Nice", "Great!", "Cool", "ok", "Perfect"),
     "The user is pleased.",
     "You are welcome! Do you have another sum for me?"),
    (("Bye", "Goodbye!", "See you later", "Good night", "bye bye", "See you!", "quit", "exit"),
     "The user says goodbye.",
     "Goodbye!"),
    (("Who made you?", "Who trained you?", "Where do you come from?", "Who built you?", "Who created you?",
      "Who wrote you?", "Who is your creator?", "who made you", "By whom were you made?", "Who developed you?",
      "Where were you made?", "How were you made?", "How were you trained?", "How big are you?",
      "How many parameters do you have?"),
     "The user asks where I come from.",
     "I was trained from scratch on made-up arithmetic problems, to be the demo model of pyengine."),
    (("What is pyengine?", "Tell me about pyengine.", "what's pyengine", "What does pyengine do?", "Explain pyengine."),
     "The user asks about pyengine.",
     "pyengine is an inference engine that runs language models on the CPU. I am its small demo model."),
)  # fmt: skip

OTHER = (
    "What is the capital of {w}?", "Write a poem about {w}.", "Tell me a joke about {w}.", "Who is {w}?",
    "Why is the {w} {v}?", "Explain {w} to me.", "What is {w}?", "How do I make {w}?", "Translate {w} into French.",
    "Tell me a story about {w}.", "Where is {w}?", "When was {w} born?", "I like {w}.", "What do you think about {w}?",
    "Write a Python function that sorts {w}.", "{w}", "{w} {v}", "Do you like {w}?", "What color is the {w}?",
    "How does {w} work?", "Give me a recipe for {w}.", "What is the meaning of {w}?", "Is {w} {v}?", "Describe {w}.",
    "Tell me about {w}.", "Can you write about {w}?", "What is the best {w}?", "Summarize {w}.", "The {w} is {v}.",
    "Write a story about a {v} {w}.", "Who invented the {w}?", "Once upon a time there was a {w}.",
)  # fmt: skip
TOPICS = (
    "France", "Germany", "the moon", "sky", "love", "rain", "music", "cats", "dogs", "gravity", "history", "bread",
    "physics", "football", "Einstein", "Paris", "London", "the sun", "water", "snow", "winter", "a computer",
    "life", "telephone", "light", "soup", "pizza", "quantum mechanics", "the weather",
    "Shakespeare", "the sea", "a list", "king", "a car",
)  # fmt: skip
TRAITS = ("blue", "green", "big", "old", "happy", "fast", "warm", "beautiful", "important", "sad", "lazy", "true")


def _talk(rng: Random) -> Exchange:
    roll = rng.random()
    if roll < 0.55:
        asked, steps, reply = rng.choice(TALK)
        question = rng.choice(asked)
        return Exchange(question.lower() if rng.random() < 0.3 else question, steps, reply)
    if roll < 0.85:
        topic = rng.choice(TOPICS) if rng.random() < 0.6 else made_up(rng)
        question = rng.choice(OTHER).format(w=topic, v=rng.choice(TRAITS))
        steps = "This is not an arithmetic problem, so I cannot help with it."
        return Exchange(_casual(question, rng), steps, f"I only know arithmetic. {TRY}")
    if roll < 0.90:
        reply = f"I only know arithmetic. {TRY}"
        return Exchange(_gibberish(rng), "This is not an arithmetic problem, so I cannot help with it.", reply)
    return _too_large(rng)


SCRIPTS = ((0x21, 0x7E), (0xA1, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x64A), (0x905, 0x939),
           (0x3041, 0x30FE), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F))  # fmt: skip


def _gibberish(rng: Random) -> str:
    """Random characters of one script, so that no byte token is left untrained."""
    low, high = rng.choice(SCRIPTS)
    words = ["".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
    return " ".join(words)


def _too_large(rng: Random) -> Exchange:
    """Sums beyond what the model was taught: it says so rather than guess."""
    high = 10 ** rng.randint(4, 7) - 1
    op = rng.choice("+-x/")
    a, b = rng.randint(LARGEST + 1, high), rng.randint(13, high)
    if rng.random() < 0.5:
        a, b = b, a
    if op in "x/" and rng.random() < 0.6:
        a, b = rng.randint(200, LARGEST) if op == "/" else rng.randint(13, LARGEST), rng.randint(13, 99)
    question = _casual(rng.choice(ASK).format(e=_typed(f"{a} {op} {b}", rng)), rng)
    return Exchange(question, "These numbers are too large for me.", f"That is too large for me. {CAN}")


def _remainder(rng: Random) -> Exchange:
    """A division that does not come out even has two numbers in its answer, so it is practice, not an exam problem."""
    divisor, quotient = rng.randint(2, 12), rng.randint(1, 12)
    rest = rng.randint(1, divisor - 1)
    a, fits = divisor * quotient + rest, divisor * quotient
    question = _casual(rng.choice(ASK).format(e=_typed(f"{a} / {divisor}", rng)), rng)
    steps = [
        f"I need to divide {a} by {divisor}.",
        f"{divisor} x {quotient} = {fits}, so {a} - {fits} = {rest} is left over.",
    ]
    return Exchange(question, "\n".join(steps), f"{a} / {divisor} = {quotient} with remainder {rest}")


# ---------------------------------------------------------------- the two sides of the split


def is_held_out(problem: Problem) -> bool:
    return hashlib.sha256(problem.key.encode()).digest()[0] % HELD_OUT_SHARE == 0


def train_stream(seed: int) -> Iterator[Exchange]:
    """An endless stream of exchanges to learn from; never a held-out one."""
    rng = Random(seed)
    while True:
        if (roll := rng.random()) < 0.12:
            yield _talk(rng)
        elif roll < 0.14:
            yield _remainder(rng)
        elif not is_held_out(candidate := problem(rng)):
            yield candidate


def held_out(n: int = 200, seed: int = 20_000) -> list[Problem]:
    """`n` different problems that `train_stream` never yields, whatever its seed."""
    rng = Random(seed)
    chosen: dict[str, Problem] = {}
    while len(chosen) < n:
        candidate = problem(rng)
        if is_held_out(candidate):
            chosen.setdefault(candidate.question, candidate)
    assert all(map(is_held_out, chosen.values()))
    return list(chosen.values())


def extract_answer(text: str) -> int | None:
    """The number a reply ends in: the last integer after </think>, or None when there is none."""
    _, found, reply = text.rpartition("</think>")
    numbers = re.findall(r"(?<!\d)-?\d+", reply if found else "")
    return int(numbers[-1]) if numbers else None
