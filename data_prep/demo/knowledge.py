"""The small world of the demo: classes of things, and what is true of every member of a class.

Sentences about it pre-train the demo's base; the generated items ask which thing belongs to the class that a question
means. No word is in two classes, so every item has exactly one right answer. The text is the project's own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A class: its members (single words), and predicates that hold for each of them."""

    name: str
    members: tuple[str, ...]
    facts: tuple[str, ...]


def _kind(name: str, facts: str, members: str) -> Kind:
    return Kind(name, tuple(members.split()), tuple(fact.strip() for fact in facts.split(";")))


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        _kind(
            "animal",
            "is an animal; breathes and runs; can see and hear; has a mother",
            "dog cat cow horse sheep goat pig wolf bear fox deer lion tiger mouse rabbit hen goose swan eagle owl frog "
            "whale shark camel monkey donkey beaver zebra",
        ),
        _kind(
            "plant",
            "is a plant; grows in the soil; needs water and sun; has roots",
            "oak rose tulip fern moss daisy lily pine birch maple willow cactus grass bush vine ivy clover poppy reed "
            "thistle elm cedar bamboo orchid violet nettle heather palm",
        ),
        _kind(
            "food",
            "is something to eat; tastes good; comes from the kitchen; is served for lunch",
            "bread cheese soup rice apple pear plum carrot potato bean egg butter honey jam cake pie salad noodle "
            "sausage tomato onion banana lemon grape cherry porridge omelette pancake",
        ),
        _kind(
            "tool",
            "is a tool; helps to build things; lies in the workshop; is used by hand",
            "hammer saw spade rake drill chisel wrench axe shovel pliers clamp screwdriver crowbar hoe trowel mallet "
            "pickaxe scythe lever vise sander awl anvil ladle tongs sickle hatchet auger",
        ),
        _kind(
            "garment",
            "is something to wear; is made of cloth; hangs in the closet; keeps people warm",
            "shirt coat hat scarf glove sock skirt dress jacket belt cap sweater boot shoe vest mitten shawl robe tie "
            "trouser apron blouse sandal slipper cloak hood uniform jersey",
        ),
        _kind(
            "vehicle",
            "is a vehicle; carries people far; needs a driver; moves fast",
            "car bus train truck bicycle boat ship plane tram ferry van taxi tractor canoe raft yacht rocket glider "
            "scooter wagon sled cart subway lorry balloon kayak trolley barge",
        ),
        _kind(
            "shape",
            "is a shape; is drawn with a ruler",
            "circle square triangle line dot cube cone sphere oval star spiral arc angle curve cross loop grid stripe "
            "wedge prism",
        ),
        _kind(
            "sound",
            "is a sound; is heard by the ear",
            "whisper shout echo hum buzz click bang tune roar murmur hiss crack thud clang beep chime rumble squeak "
            "drone jingle",
        ),
        _kind(
            "writing",
            "is made of paper; is read by people",
            "letter map book poster ticket stamp postcard page notebook newspaper envelope receipt leaflet diary "
            "magazine label banknote form list atlas",
        ),
        _kind(
            "joy",
            "is a pleasant feeling; makes people smile",
            "happy proud glad cheerful calm joyful pleased grateful relieved hopeful excited content delighted merry "
            "peaceful thankful",
        ),
        _kind(
            "sorrow",
            "is an unpleasant feeling; makes people cry",
            "sad angry afraid upset lonely bored jealous ashamed gloomy nervous furious guilty worried miserable hurt "
            "bitter",
        ),
    )
}
"""Every class by its name."""

LIVING = ("animal", "plant")
FEELINGS = ("joy", "sorrow")
THINGS = tuple(name for name in KINDS if name not in FEELINGS)

_PEOPLE = (
    "Anna Ben Carl Dora Emil Finn Gina Hugo Ida Kate Leo Mia Nora Omar Paul Rosa Sam Tess Uma Vera Will Yara Zoe Max "
    "Lena Otto Pia Jonas"
)
PEOPLE = tuple(_PEOPLE.split())

GOOD_NEWS = (
    "won a race",
    "got a gift",
    "met a friend",
    "passed a test",
    "found a coin",
    "got a medal",
    "heard a joke",
    "saw a rainbow",
    "was praised",
    "came home",
)


def noun(word: str) -> str:
    """The word with its article: `a whale`, `an owl`."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
