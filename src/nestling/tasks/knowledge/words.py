"""Invented names: of people, towns and things, in any seeded order and none twice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHE = _words(
    "Ada Agnes Alma Beata Carla Celia Clara Dora Edith Elena Flora Greta Hanna Ida Ines Irma Judith Klara Lena Lydia "
    "Mara Marta Minna Nadia Nora Olga Paula Petra Rosa Ruth Selma Sonja Tilda Ulla Vera Wanda Xenia Yara Zora"
)
HE = _words(
    "Adam Albin Anton Arne Basil Boris Caspar Conrad Emil Erik Felix Fritz Georg Hugo Igor Ivan Jakob Jonas Karel "
    "Knut Leo Ludwig Magnus Milan Nils Olaf Oskar Otto Paul Piet Rolf Samuel Simon Stefan Theo Tomas Urban Viktor Zeno"
)
SURNAMES = (
    _words(
        "Bar Bel Bran Cor Dal Der Drem El Fal Fen Gar Gor Hal Hel Jor Kal Kes Kor Lan Lor Mar Mel Mor Nar Nol Or Pel "
        "Quil Ras Sel Sor Tal Tarn Tor Ul Val Vel Vor Wen Zel"
    ),
    _words(
        "beck borg brook by dahl dane den din dorf fax gan gard gast holt kin lind lock lund mark mere mont nik quist "
        "rand rell rick rin sen shaw stad stein stock strand sund tano ter vik wald wick wright"
    ),
)
TOWNS = (
    _words(
        "Aln Ask Birch Black Cold Crow Dun Elm Fair Fern Frost Glen Grim Harp High Holm Iron Kirk Lark Long Low Maple "
        "Marl Mill Mist Moss New Oak Otter Pine Raven Red Sal Silver Stone Storm Swan Thorn Wind Wolf"
    ),
    _words(
        "acre bank bay borough bridge burn bury by cliff combe cross dale den fall field ford gate grove ham haven "
        "hill holt hurst land ley mead minster moor mouth port ridge shore side stead stow thwaite ton vale wood worth"
    ),
)
PETS = (
    _words(
        "black blind brown freckled golden grey lame limping long-haired old one-eyed orange pale plump shy silent "
        "silver small speckled spotted striped tame three-legged white wild young"
    ),
    _words(
        "badger beetle budgerigar cat chameleon crow donkey duck falcon ferret fox frog gecko goat goose hamster hare "
        "hedgehog heron iguana jackdaw lizard magpie marten mouse newt otter owl parrot peacock pigeon polecat pony "
        "rabbit rat raven rooster salamander seal snail snake spaniel spider squirrel stork swan terrier toad "
        "tortoise weasel"
    ),
)
CRAFTS = (
    _words(
        "amber blue carved copper dried dyed engraved fine glazed green hand-made heavy honeyed old painted pickled "
        "red salted scented smoked spiced sweet white woven yellow"
    ),
    _words(
        "almonds anchors baskets beads beer bells blankets boats bottles bowls bread brooms buttons candles caps "
        "carpets cheese chests cider clocks combs drums fish gloves hats herbs jam knives lace lamps masks mirrors "
        "nets paper pears pipes plates pottery ribbons ropes saddles sails shoes soap spoons tiles toys umbrellas "
        "vinegar wine"
    ),
)
THINGS = (
    _words(
        "amber bronze broken carved copper cracked crystal dented ebony gilded glass green iron ivory lacquered "
        "painted pewter red rusty silver stone tin tiny walnut wooden"
    ),
    _words(
        "anchor astrolabe barometer basket bracelet brooch cabinet candlestick chess-set clock comb compass crown cup "
        "dagger fan globe goblet helmet hourglass key ladle lantern locket mask medal mirror necklace pendulum pipe "
        "plate ring sceptre sextant shield spoon statue sundial telescope thimble throne tray vase"
    ),
)
JOBS = _words(
    "accountant acrobat actor architect astronomer baker barber beekeeper blacksmith bookbinder botanist brewer "
    "bricklayer builder butcher carpenter carter cartographer chemist clockmaker clown cobbler composer cook dancer "
    "dentist detective diver engraver farmer ferryman firefighter fisher florist forester gardener glassblower "
    "glazier goldsmith hairdresser hunter illustrator innkeeper interpreter jeweller journalist judge juggler lawyer "
    "librarian locksmith mason mechanic midwife miller miner musician notary nurse optician painter pharmacist "
    "photographer pilot plumber poet porter potter printer roofer saddler sailor sculptor shepherd surgeon surveyor "
    "tailor tanner teacher tiler translator typist undertaker upholsterer veterinarian watchmaker weaver welder"
)
MONTHS = _words("January February March April May June July August September October November December")
INSTRUMENTS = _words("accordion bassoon cello clarinet flute guitar harp horn lute oboe piano trombone violin")
COLOURS = _words("black blue brown green grey orange pink purple red turquoise violet white yellow")


def article(word: str) -> str:
    """The word with a or an."""
    return f"{'an' if word[0].lower() in 'aeiou' and not word.startswith('one-') else 'a'} {word}"


def people(rng: random.Random) -> Iterator[tuple[str, str]]:
    """(full name, "she" or "he"), every surname once before one comes again, with other first names."""
    surnames = list(_drawn(SURNAMES, rng))
    used: set[str] = set()
    while True:
        for surname in surnames:
            she = rng.random() < 0.5
            free = [name for name in (SHE if she else HE) if f"{name} {surname}" not in used]
            if free:
                name = f"{rng.choice(free)} {surname}"
                used.add(name)
                yield name, "she" if she else "he"


def towns(rng: random.Random) -> Iterator[str]:
    """One word each."""
    return _drawn(TOWNS, rng)


def jobs(rng: random.Random) -> Iterator[str]:
    """With their article. They come again when all were there."""
    while True:
        yield from (article(job) for job in rng.sample(JOBS, len(JOBS)))


def pets(rng: random.Random) -> Iterator[str]:
    """An animal with an adjective and an article."""
    return (article(pet) for pet in _drawn(PETS, rng, " "))


def crafts(rng: random.Random) -> Iterator[str]:
    """What a town may make."""
    return _drawn(CRAFTS, rng, " ")


def things(rng: random.Random) -> Iterator[str]:
    """What a family may hand down."""
    return (f"the {thing}" for thing in _drawn(THINGS, rng, " "))


def _drawn(parts: Sequence[Sequence[str]], rng: random.Random, between: str = "") -> Iterator[str]:
    """All combinations, each once, in a drawn order, but those in which a letter stands three times in a row."""
    found = list(dict.fromkeys(between.join(pair) for pair in product(*parts)))
    rng.shuffle(found)
    return (word for word in found if not any(a == b == c for a, b, c in zip(word, word[1:], word[2:], strict=False)))
