"""The small world of the demo: tables of facts, from which sentences and questions are made.

Every relation is a function (a subject has exactly one value), so that a choice between subjects with different
values has exactly one right answer. The facts are everyday ones and the text is the project's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Relation:
    """One relation between subjects and values: `a whale` `lives` `in the sea`.

    `verb` is the third person as it stands before the value; `claim` the pattern of a yes-or-no question
    ({s} the subject with its article, {v} the value); `same` ends a comparison ("lives in the same place as").
    """

    name: str
    verb: str
    claim: str
    same: str
    groups: Mapping[str, tuple[str, ...]]

    @cached_property
    def value_of(self) -> dict[str, str]:
        """Subject -> value."""
        return {subject: value for value, subjects in self.groups.items() for subject in subjects}

    @property
    def values(self) -> list[str]:
        """The values, in table order."""
        return list(self.groups)

    def predicate(self, value: str) -> str:
        """`lives in the sea`."""
        return f"{self.verb} {value}"


@dataclass(frozen=True)
class Activity:
    """Something people do: what they take in hand for it, and what they then do."""

    name: str
    tools: tuple[str, ...]
    actions: tuple[str, ...]


def noun(subject: str) -> str:
    """The subject with its article: `a whale`, `an owl`; `someone who …` stays as it is."""
    if subject.startswith("someone"):
        return subject
    return f"{'an' if subject[0] in 'aeiou' else 'a'} {subject}"


def _groups(table: str) -> dict[str, tuple[str, ...]]:
    """`value: subject, subject` per line -> groups."""
    groups: dict[str, tuple[str, ...]] = {}
    for line in table.strip().splitlines():
        value, subjects = line.split(":")
        groups[value.strip()] = tuple(subject.strip() for subject in subjects.split(","))
    return groups


HABITAT = Relation(
    "habitat",
    "lives",
    "does {s} live {v}",
    "lives in the same place as",
    _groups("""
    on the farm: cow, pig, hen, sheep, goat, horse, donkey, turkey
    in the sea: whale, shark, crab, octopus, dolphin, lobster, squid, seahorse
    in the forest: bear, wolf, deer, fox, owl, squirrel, badger, woodpecker
    in the jungle: monkey, tiger, parrot, gorilla, toucan, sloth, leopard, jaguar
    by the pond: frog, duck, swan, newt, toad, heron, goose, beaver
    on the plains: lion, zebra, giraffe, elephant, rhino, ostrich, antelope, hyena
    in the desert: camel, scorpion, lizard, coyote
    on the ice: penguin, walrus, seal, reindeer
"""),
)
USE = Relation(
    "use",
    "is used to",
    "is {s} used to {v}",
    "is used for the same thing as",
    _groups("""
    cut wood: saw, axe, hatchet, blade, chisel
    clean floors: broom, mop, vacuum, sponge, duster
    cook food: pot, pan, oven, kettle, stove, grill
    write words: pen, pencil, chalk, crayon, marker
    dig holes: spade, shovel, hoe, drill, pickaxe
    give light: lamp, candle, lantern, torch, bulb
    carry things: basket, bucket, suitcase, backpack, cart
    play music: flute, drum, violin, guitar, piano, trumpet
    travel far: car, bus, train, bicycle, plane, ship
    sit down: chair, sofa, stool, bench, throne
"""),
)
MATERIAL = Relation(
    "material",
    "is made of",
    "is {s} made of {v}",
    "is made of the same thing as",
    _groups("""
    wood: violin, guitar, piano, chair, stool, bench, pencil, flute, barrel, plank
    metal: saw, axe, spade, shovel, pan, kettle, car, train, trumpet, coin, nail, key
    cloth: tent, ribbon, sofa, backpack, mop, shirt, scarf, flag, towel, curtain
    glass: window, mirror, bottle, jar, bulb, lens
    paper: book, letter, map, stamp, poster, ticket
    clay: brick, vase, tile, cup, pot, jug
"""),
)
COLOUR = Relation(
    "colour",
    "is",
    "is {s} {v}",
    "has the same colour as",
    _groups("""
    red: tomato, cherry, strawberry, radish, raspberry, beet
    yellow: banana, lemon, corncob, pineapple, quince
    orange: carrot, pumpkin, apricot, mandarin, peach
    green: cucumber, pea, lime, cabbage, kiwi, pear, leek, bean
    purple: plum, grape, aubergine, fig
    brown: potato, walnut, date, mushroom, chestnut
"""),
)
WORN = Relation(
    "worn",
    "is worn on",
    "is {s} worn on {v}",
    "is worn on the same part as",
    _groups("""
    the head: hat, cap, helmet, crown, wig
    the feet: shoe, boot, sock, sandal, slipper
    the hands: glove, mitten, ring, bracelet
    the neck: scarf, necklace, tie, collar
    the body: shirt, coat, dress, skirt, jacket, belt
"""),
)
WORK = Relation(
    "work",
    "works in",
    "does {s} work in {v}",
    "works in the same place as",
    _groups("""
    the hospital: doctor, nurse, surgeon, midwife
    the classroom: teacher, tutor, pupil, lecturer
    the field: farmer, shepherd, reaper, ploughman
    the restaurant: waiter, cook, chef, barman
    the theatre: actor, dancer, singer, clown
    the court: judge, lawyer, juror, prosecutor
    the workshop: carpenter, plumber, blacksmith, mechanic
    the airport: pilot, steward, porter, navigator
    the shop: seller, cashier, grocer, butcher
    the harbour: sailor, fisher, captain, docker
"""),
)
_KINDS = {
    "an animal": HABITAT,
    "something to eat": COLOUR,
    "something to wear": WORN,
    "a person at work": WORK,
}
KIND = Relation(
    "kind",
    "is",
    "is {s} {v}",
    "is the same kind of thing as",
    {
        **{kind: tuple(relation.value_of) for kind, relation in _KINDS.items()},
        "a tool": USE.groups["cut wood"] + USE.groups["dig holes"] + USE.groups["clean floors"],
        "a vehicle": USE.groups["travel far"],
        "an instrument": USE.groups["play music"],
        "a seat": USE.groups["sit down"],
    },
)
FEELING = Relation(
    "feeling",
    "feels",
    "does {s} feel {v}",
    "feels the same as",
    {
        feeling: tuple(f"someone who {event}" for event in events)
        for feeling, events in _groups("""
    sad: lost a toy, missed a friend, broke a cup, failed a test, dropped a cake, left home
    happy: got a gift, met a friend, found a coin, went to a party, heard a joke, saw a rainbow
    proud: won a race, passed a test, built a house, got a medal, learned to swim, wrote a book
    afraid: saw a ghost, heard thunder, met a wolf, got lost in the dark, stood on a cliff, had a nightmare
    tired: ran all day, worked all night, climbed a hill, carried stones, slept too little, moved house
    angry: was robbed, was insulted, got a fine, was cheated, was pushed, was blamed
    bored: waited for hours, had nothing to do, watched paint dry, heard a long speech, stood in line, sat alone
    hungry: skipped lunch, ate nothing, smelled fresh bread, forgot breakfast, saw a feast, fasted all day
    """).items()
    },
)
ACTIVITIES = tuple(
    Activity(*row)
    for row in (
        (
            "Gardening",
            ("spade", "hoe", "rake", "seedling"),
            ("waters the flowers", "plants a bush", "pulls out weeds"),
        ),
        ("Cooking", ("pot", "pan", "ladle", "stove"), ("stirs the soup", "fries an egg", "boils some rice")),
        (
            "Painting",
            ("brush", "canvas", "easel", "palette"),
            ("mixes two colours", "draws a portrait", "colours the sky"),
        ),
        (
            "Fishing",
            ("rod", "hook", "net", "bait"),
            ("casts the line", "catches a trout", "pulls in the fish"),
        ),
        (
            "Sewing",
            ("needle", "thread", "button", "thimble"),
            ("mends a shirt", "stitches the cloth", "hems a dress"),
        ),
        (
            "Cleaning",
            ("broom", "mop", "sponge", "vacuum"),
            ("scrubs the floor", "wipes the table", "dusts the shelf"),
        ),
        (
            "Writing",
            ("pen", "pencil", "notebook", "crayon"),
            ("fills a page", "signs a letter", "ends the story"),
        ),
        (
            "Building",
            ("hammer", "brick", "ladder", "drill"),
            ("lays a wall", "nails a plank", "raises the roof"),
        ),
        (
            "Skiing",
            ("ski", "slope", "snowsuit", "pole"),
            ("glides downhill", "jumps over the snow", "turns on the ice"),
        ),
        (
            "Music",
            ("violin", "drum", "guitar", "flute"),
            ("plays a song", "tunes the strings", "sings a melody"),
        ),
        (
            "Sailing",
            ("sail", "rudder", "anchor", "compass"),
            ("steers the boat", "crosses the bay", "rides the waves"),
        ),
        (
            "Baking",
            ("oven", "rolling pin", "dough", "tray"),
            ("bakes a loaf", "kneads the dough", "ices a cake"),
        ),
    )
)

THINGS = (HABITAT, USE, MATERIAL, COLOUR, WORN, WORK, KIND)
"""Relations whose subjects are nouns."""
RELATIONS = (*THINGS, FEELING)
PEOPLE = ("Anna", "Tom", "Mia", "Ben", "Lena", "Paul", "Nora", "Sam", "Ida", "Max", "Eva", "Leo")
