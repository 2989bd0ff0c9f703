"""Word problems: templates, phrasings, names and things. `problems.py` fills in the numbers.

Names and things are to be copied, not recalled, so many are made up. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random


def words(text: str) -> list[str]:
    return text.split()


HE = words(
    "Tom Ben Omar Leo Max Ravi Sam Juan Paul Alex Jack James John David Daniel Ali Ahmed Carlos Diego Felix "
    "Oscar Noah Liam Ethan Lucas Henry Arjun Wei Kenji Hiro Ivan Boris Peter Mark Luke Adam Eric Frank George "
    "Hugo Igor Jorge Karl Lars Mateo Nils Otto Pedro Quentin Rahul Stefan Tariq Umar Victor Walter Xavier "
    "Yusuf Zack Bob Bill Mike"
)
SHE = words(
    "Anna Lily Mia Sara Nina Emma Kate Yuki Zoe Lucy Priya Aisha Fatima Maria Sofia Olivia Ava Chloe Grace "
    "Hannah Ines Julia Karen Laura Mei Nadia Olga Petra Rosa Susan Tara Uma Vera Wendy Ximena Yara Zara Alice "
    "Betty Clara Diana Elena Freya Greta Helen Irina Jane Kiara Leila Mary Nora Penny Rachel Sally Tina Amara "
    "Keiko Ananya Ngozi Jasmine"
)
PEOPLE = words(
    "farmer teacher baker boy girl student shopkeeper gardener child chef painter librarian driver fisherman "
    "coach doctor florist scientist pirate wizard tailor nurse squirrel monkey robot"
)
THINGS = words(
    "apples books marbles pencils stickers coins cards oranges cookies eggs balls flowers stamps shells toys "
    "cups buttons candies pears stones mangoes bananas grapes lemons peaches plums cherries berries "
    "strawberries tomatoes potatoes carrots onions pumpkins melons nuts beans seeds sweets chocolates cakes "
    "muffins donuts cupcakes pies sandwiches pizzas bottles glasses plates spoons forks knives chairs tables "
    "lamps candles pens crayons markers erasers rulers notebooks papers letters envelopes pictures photos "
    "posters paintings beads ribbons balloons kites dolls puzzles blocks bricks cars trucks trains planes "
    "boats bikes wheels shirts socks hats shoes gloves scarves coats keys rings necklaces gems pearls rocks "
    "sticks leaves trees roses tulips bushes cats dogs fish birds hens chickens ducks cows sheep goats horses "
    "rabbits frogs bees butterflies tickets points dollars magazines comics songs videos games tokens badges "
    "medals pebbles feathers acorns walnuts tiles boards nails screws batteries phones"
)
KINDS = words("red blue green yellow small big old new toy gold white black ripe wooden glass paper chocolate")
BOXES = words(
    "box bag basket pack jar tray crate carton bowl shelf row drawer bucket tin group pen cage team tank class"
)
SPOTS = words("table roof field garden shop room box tree house street yard farm river beach barn school bench wall")
UNITS = words("day week hour month year")

# What `<name>` in a template stands for.
PHRASES = {
    "<gets>": (
        "[gets|buys|finds|receives|is given|picks|collects|wins|makes|earns|adds|picks "
        "up|takes|gains|grabs|bakes|orders]"
    ),
    "<got>": "[got|bought|found|received|was given|picked|collected|won|made|earned|added|picked up|took|was handed]",
    "<loses>": (
        "[gives away|loses|eats|sells|drops|breaks|uses|throws away|gives {N2}|hands out|donates|uses "
        "up|shares|mails|spends]"
    ),
    "<lost>": (
        "[gave away|lost|ate|sold|dropped|broke|used|threw away|gave {N2}|handed "
        "out|donated|returned|burned|spent|removed]"
    ),
    "<how many now>": "How many[ {t}|] does [{m}|{s}] have[ now| in total| altogether| in all|]?",
    "<how many left>": (
        "How many[ {t}|] [does [{m}|{s}] have left|does [{m}|{s}] still have|are left|remain|does [{m}|{s}] have now]?"
    ),
    "<riders>": "[people|passengers|children|students]",
    "<relative>": "[[Her|His|{N2}'s] [uncle|aunt|mother|father|brother|sister|friend|cousin|teacher]|{N2}]",
    "<in total>": "[in total|in all|altogether]",
}


@dataclass(frozen=True)
class Story:
    """A word problem.

    `[one|other]` is a choice, `<name>` one of PHRASES, `{x}` a word from `cast`. `{a} {b} {c}` are the numbers, `{r}`
    is the result. The reason has one wording for all the choices: to get there from verbs and names of every kind is
    what the model has to learn.
    """

    ops: str  # one or two operations: a op b, then op c on its result
    question: str
    reason: str
    answer: str


STORIES = (
    Story(
        "+",
        "{n} [has|owns|had] {a} {t}. <relative> [gives|gave|sends|brings|sells] {o} {b} [more|{t}|more {t}]. "
        "<how many now>",
        "{m} starts with {a} {t} and gets {b} more",
        "{m} has {r} {t}.",
    ),
    Story(
        "-",
        "There are {a} {t} in [a|the] {w}. {b} [of them |]are {k}[ and the rest are {k2}|]. How many are "
        "[{k2}|not {k}]?",
        "There are {a} {t} and {b} are {k}",
        "There are {r} left.",
    ),
    Story(
        "+-",
        "{n} [has|had|starts with] {a} {t}. {s} [gets|finds|buys|found|bought|got] {b} more[ {t}|] and[ then|] "
        "[gives|gave|sells|sold|sends|lends] {c}[ of them|] to {N2}. [<how many left>|<how many now>]",
        "{m} starts with {a} {t}, gets {b} more and {c} go away",
        "{m} has {r} {t}.",
    ),
    Story(
        "+",
        "{n} [has|owns|starts with|holds] {a} {t}[. {s}| and|, and then {s}|, then] <gets> {b} [more|more|more "
        "{t}|other {t}]. <how many now>",
        "{m} starts with {a} {t} and gets {b} more",
        "{m} has {r} {t}.",
    ),
    Story(
        "+",
        "[{n} had {a} {t}[. {s}| and|. Then {s}|. Later {s}] <got> {b} more|{n} had {a} {t}. [{N2} gave {o} {b} "
        "more|<relative> [gives|gave|sent] {o} {b} [more|{t}|more {t}]|{s} <got> {b} [extra|more|new] {t}]]. "
        "<how many now>",
        "{m} starts with {a} {t} and gets {b} more",
        "{m} has {r} {t}.",
    ),
    Story(
        "+",
        "[If|Suppose] {n} [has|had] {a} {t} and [gets|buys|finds|{N2} gives {o}] {b} more, how many {t} "
        "[does|will] {s} have[ now|]?",
        "{m} starts with {a} {t} and gets {b} more",
        "{m} has {r} {t}.",
    ),
    Story(
        "+",
        "{n} has {a} {t}[ and|.|,] {N2} has {b}[ {t}| more|]. How many[ {t}|] do they have [together|in "
        "total|altogether|in all|between them]?",
        "{m} has {a} and {N2} has {b}",
        "Together they have {r} {t}.",
    ),
    Story(
        "+",
        "There are {a} {k} {t} and {b} {k2} {t} [in a box|in the room|on the table|here|]. How many {t} are there "
        "[in all|in total|altogether]?",
        "There are {a} {k} and {b} {k2} {t}",
        "There are {r} {t} in all.",
    ),
    Story(
        "+",
        "There [are|were] {a} {t} [in a box|on a shelf|in the garden|in the store]. [{n} adds {b} more|{b} more "
        "[are added|arrive|come|are put in]|Then {b} more are [added|placed there]]. How many {t} are there[ now|]?",
        "There are {a} {t} and {b} more come",
        "There are {r} {t} now.",
    ),
    Story(
        "+",
        "{n} [found|bought|picked|made|sold|saw|counted|baked|collected] {a} {t} [on Monday|in the "
        "morning|today|first|last week|on Saturday] and {b} [{t} |more |]on [Tuesday|Sunday|Friday]. How many {t} "
        "[was that|is that|were there|are there] <in total>?",
        "{m} counts {a} and then {b} {t}",
        "It is {r} {t} in total.",
    ),
    Story(
        "+",
        "A [shop|bakery|store|farm] [sold|made|packed] {a} {t} in the morning and {b} in the [afternoon|evening]. "
        "How many {t} [is that|was that|were there] <in total>?",
        "It is {a} and then {b} {t}",
        "It is {r} {t} in total.",
    ),
    Story(
        "+",
        "{n} [drove|walked|ran|rode|travelled] {a} [miles|km] and then [another |]{b}[ more|]. How [far|many "
        "miles] did {s} go?",
        "{m} goes {a} and then {b}",
        "{m} went {r}.",
    ),
    Story(
        "-",
        "{n} [has|owns|starts with] {a} {t}[. {s}| and|, and then {s}|, then|, but] <loses> {b}[| of them| {t}]. "
        "<how many left>",
        "{m} starts with {a} {t} and {b} go away",
        "{m} has {r} {t} left.",
    ),
    Story(
        "-",
        "{n} had {a} {t}[. {s}| and|. Then {s}|, but] <lost> {b}[| of them| {t}]. <how many left>",
        "{m} starts with {a} {t} and {b} go away",
        "{m} has {r} {t} left.",
    ),
    Story(
        "-",
        "{n} [has|had|has] {a} {t}. {s} [gives|gave|sells|lends|sold] {b}[ of them|] to {N2}. <how many left>",
        "{m} starts with {a} {t} and {b} go away",
        "{m} has {r} {t} left.",
    ),
    Story(
        "-",
        "If {n} has {a} {t} and [loses|eats|sells|gives away|uses] {b}[ of them|], how many[ {t}|] [are left|does "
        "{s} have left|remain]?",
        "{m} starts with {a} {t} and {b} go away",
        "{m} has {r} {t} left.",
    ),
    Story(
        "-",
        "{n} has {a} {t} and {N2} has {b}[ {t}|]. How many more {t} does {m} have[ than {N2}|]?",
        "{m} has {a} and {N2} has {b}",
        "{m} has {r} more {t}.",
    ),
    Story(
        "-",
        "There [were|are] {a} {t} [on|in] [a|the] {w}. [{n} took {b}|{b} [of them |][were sold|were taken|are "
        "taken away|"
        "fell down|are broken|were eaten|flew away|ran away|left|go home|die]|{n} takes {b} of them]. How many[ "
        "{t}|] are "
        "[left|still there|there now|still [on|in] the {w}]?",
        "There are {a} {t} and {b} go away",
        "There are {r} {t} left.",
    ),
    Story(
        "-",
        "[A|The] book has {a} pages. {n} has read {b}[ pages| of them|]. How many pages are left[ to read|]?",
        "The book has {a} pages and {m} has read {b}",
        "{m} has {r} pages left to read.",
    ),
    Story(
        "-",
        "{n} [had|has] [{a} dollars|${a}] and [spent|spends|paid|pays] [{b} dollars|${b}][ on {t}|]. How [much "
        "money|many dollars] [is left|does {s} have left|does {m} have now]?",
        "{m} starts with {a} dollars and {b} go away",
        "{m} has {r} dollars left.",
    ),
    Story(
        "x",
        "{n} [has|buys|fills|owns|packs] {a} {x} [with {b} {t} in each|of {b} {t} each|with {b} {t} each|, each "
        "with {b} {t}]. How many {t} [does {s} have|are there][ <in total>|]?",
        "There are {a} {x} with {b} {t} each",
        "There are {r} {t} in total.",
    ),
    Story(
        "x",
        "There are {a} {x}[. Each [one |]holds {b} {t}|. Each has {b} {t}| with {b} {t} in each| with {b} {t} in "
        "every one|, and every one has {b} {t}]. How many {t} are there <in total>?",
        "There are {a} {x} with {b} {t} each",
        "There are {r} {t} in total.",
    ),
    Story(
        "x",
        "{n} [reads|makes|sells|eats|collects|picks|paints|bakes|washes] {a} {t} [every|each|a|per] {u}[. How many {t} "
        "[is that|does {s} [read|make|sell|eat|have]] in {b} {u}s| for {b} {u}s. How many {t} is that <in total>]?",
        "There are {b} {u}s with {a} {t} each",
        "It is {r} {t} in total.",
    ),
    Story(
        "x",
        "[One|A|Each] [ticket|toy|book|pen|cake] costs [{a} dollars|${a}]. How much do {b}[ of them| such things|] "
        "cost[ in total|]?",
        "There are {b} at {a} dollars each",
        "They cost {r} dollars.",
    ),
    Story(
        "x",
        "[Each|Every|One|A] {x1} [holds|has|contains] {b} {t}. How many {t} are [there |]in {a} {x}?",
        "There are {a} {x} with {b} {t} each",
        "There are {r} {t} in total.",
    ),
    Story(
        "x",
        "{n} has {a} {t}. {N2} has {b} times as many. How many[ {t}|] does {N2} have?",
        "{N2} has {b} times {a} {t}",
        "{N2} has {r} {t}.",
    ),
    Story(
        "-",
        "{n} [needs|wants] {a} {t}[ and|. {s}|, but] [already |]has {b}. How many more[ {t}|] does {s} need?",
        "{m} needs {a} {t} and has {b}",
        "{m} needs {r} more {t}.",
    ),
    Story(
        "/",
        "{n} [shares|divides|splits] {a} {t} [equally |evenly |]among {b} [friends|children|people|cousins]. How "
        "many[ {t}|] does each[ one| of them| friend|] get?",
        "{a} {t} are shared among {b}",
        "Each gets {r} {t}.",
    ),
    Story(
        "/",
        "{b} [friends|children|people|kids] share {a} {t} [equally|evenly]. How many[ {t}|] does each[ one|] get?",
        "{a} {t} are shared among {b}",
        "Each gets {r} {t}.",
    ),
    Story(
        "/",
        "{n} [puts|packs|sorts] {a} {t} into {x} of {b}[ each|]. How many {x} [does {s} need|are there|does {s} fill]?",
        "{a} {t} go into {x} of {b}",
        "There are {r} {x}.",
    ),
    Story(
        "/",
        "{n} [puts|packs|sorts|places] {a} {t} [equally|evenly] into {b} {x}. How many[ {t}|] are in each[ one|]?",
        "{a} {t} are shared among {b}",
        "Each gets {r} {t}.",
    ),
    Story(
        "+-",
        "{n} has {a} {t}[. {s}| and|,] <gets> {b} more[ and then|, then| and|. Then {s}] <loses> {c}[| of them]. "
        "<how many left>",
        "{m} starts with {a} {t}, gets {b} more and {c} go away",
        "{m} has {r} {t}.",
    ),
    Story(
        "-+",
        "{n} has {a} {t}[. {s}| and|,] <loses> {b}[| of them][ and then|, then| and|. Then {s}] <gets> {c} more. "
        "<how many now>",
        "{m} starts with {a} {t}, {b} go away and {m} gets {c} more",
        "{m} has {r} {t}.",
    ),
    Story(
        "-+",
        "[There are {a} <riders> on a [bus|train|boat]|A [bus|train|boat] has {a} <riders>]. {b} [<riders> |][get off|"
        "leave] and {c} [more |]get on. How many <riders> are [on it|there|on the [bus|train|boat]] now?",
        "{a} people start, {b} get off and {c} get on",
        "There are {r} people now.",
    ),
    Story(
        "x+",
        "{n} has {c} {t}. {s} [buys|gets|finds] {a} {x} [with {b} {t} in each|of {b} {t} each]. <how many now>",
        "{m} starts with {c} {t} and gets {a} {x} with {b} {t} each",
        "{m} has {r} {t}.",
    ),
    Story(
        "x-",
        "{n} has {a} {x} [with {b} {t} in each|of {b} {t} each]. {s} <loses> {c}[ of them|]. <how many left>",
        "{m} starts with {a} {x} with {b} {t} each and {c} go away",
        "{m} has {r} {t} left.",
    ),
    Story(
        "+",
        "I [have|had] {a} {t}[ and|. I|, then I] [get|buy|find|got|bought|found|was given] {b} more. How many[ "
        "{t}|] do I have[ now|]?",
        "You start with {a} {t} and get {b} more",
        "You have {r} {t}.",
    ),
    Story(
        "-",
        "I [have|had] {a} {t}[ and|. I|, then I] [eat|lose|sell|give away|ate|lost|sold|gave away] {b}[| of them]. "
        "How many[ {t}|] [do I have left|are left|do I have now]?",
        "You start with {a} {t} and {b} go away",
        "You have {r} {t} left.",
    ),
)


def choose(text: str, rng: Random) -> str:
    """Settles every `<name>` and `[one|other]`, the innermost first."""
    for name, phrase in PHRASES.items():
        text = text.replace(name, phrase)
    while (settled := re.sub(r"\[([^\[\]]*)\]", lambda found: rng.choice(found[1].split("|")), text)) != text:
        text = settled
    return text


def made_up(rng: Random) -> str:
    """A word nobody has seen, so that names and things are copied rather than recalled: syllables or bare letters."""
    if rng.random() < 0.2:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7)))
    starts, ends = "b c d f g h j k l m n p qu r s t v w x y z br ch cl dr gr pl sh st th tr", " n r s l m t ck nd st x"
    syllables = rng.choices((1, 2, 3), (1, 3, 2))[0]
    middle = [rng.choice(starts.split()) + rng.choice("aeiou" * 3 + "y") for _ in range(syllables)]
    return rng.choice(("", "", "a", "e", "i", "o")) + "".join(middle) + rng.choice(ends.split(" "))


def somebody(rng: Random) -> tuple[str, str, str]:
    """(at the first mention, afterwards, he or she)."""
    pronoun = rng.choice(("he", "she"))
    if (roll := rng.random()) < 0.45:
        name = rng.choice(HE if pronoun == "he" else SHE)
    elif roll < 0.8:
        name = made_up(rng).capitalize()
    elif roll < 0.87:
        title = rng.choice(("Mr.", "Mrs.", "Captain", "Aunt", "Uncle", rng.choice(SHE), made_up(rng).capitalize()))
        name = f"{title} {made_up(rng).capitalize()}"
    else:
        person = rng.choice(PEOPLE)
        return f"{rng.choice(('a', 'the'))} {person}", f"the {person}", pronoun
    return name, name, pronoun


def things(rng: Random) -> str:
    noun = rng.choice(THINGS) if rng.random() < 0.6 else made_up(rng) + "s"
    return f"{rng.choice(KINDS)} {noun}" if rng.random() < 0.1 else noun


def container(rng: Random) -> tuple[str, str]:
    """(one, many)."""
    box = rng.choice(BOXES) if rng.random() < 0.7 else made_up(rng)
    irregular = {"box": "boxes", "shelf": "shelves", "class": "classes"}
    return box, irregular.get(box, box + "s")


def cast(rng: Random) -> dict[str, str]:
    """The words of one story.

    `n` is somebody, first mentioned, `m` the same again, `N2` somebody else, `s` he or she, `o` him or her, `t` things,
    `k` and `k2` what kinds of them, `x1` and `x` a box and boxes, `u` a unit of time, `w` a place.
    """
    name, again, pronoun = somebody(rng)
    other = somebody(rng)[1]
    kind, kind2 = rng.sample(KINDS, 2)
    box, boxes = container(rng)
    return {
        "n": name,
        "m": again,
        "N2": other,
        "s": pronoun,
        "o": "him" if pronoun == "he" else "her",
        "k": kind,
        "k2": kind2,
        "x1": box,
        "x": boxes,
        "t": things(rng),
        "u": rng.choice(UNITS),
        "w": rng.choice(SPOTS) if rng.random() < 0.7 else made_up(rng),
    }


def sentences(text: str) -> str:
    """A capital at the start of every sentence."""
    return re.sub(r"(^|[.?] )([a-z])", lambda found: found[1] + found[2].upper(), text)
