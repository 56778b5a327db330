"""
The embedded dataset: children's stories from a random grammar, so that a first run, the demo and the tests need no network.

The stories keep a small model learning for minutes: word frequencies, grammar, counting, and names that return later.
"""

import random
import re

WORDS = {k: v.split() for k, v in {
    "name": "Ada Ben Cleo Dan Elsa Finn Gus Hana Ivo June Kofi Lila Max Nora Omar Pia Quin Rosa Sam Tess Uma Vic Wren Yan Zoe",
    "animal": "fox owl bear rabbit hedgehog mouse dragon robot giant otter frog pony goose badger cat turtle crow wolf snail",
    "noun": "lantern key kite drum map scarf bell boat pie telescope book clock seed shell stone rope basket hat button candle "
            "feather ladder mirror needle pebble pillow puzzle ribbon shoe spoon stick sword ticket wheel whistle wagon blanket",
    "adjective": "little big old red blue green golden silver shiny heavy warm cold soft broken lost round quiet loud strange "
                 "wooden tiny dusty bright dark kind brave shy clever lazy curious gentle stubborn cheerful sleepy honest greedy",
    "place": "forest river mill market castle lighthouse garden cave school harbour meadow library hill barn island village bridge "
             "tower lake field kitchen attic road beach",
    "did": "found lost carried dropped painted hid washed mended borrowed wanted saw heard followed counted shook opened pushed "
           "pulled wrapped shared kept forgot remembered touched watched cleaned",
    "acted": "danced sang ran swam climbed slept read waited whistled jumped laughed cried walked stumbled sneezed listened "
             "nodded wondered shivered smiled",
    "how": "quickly slowly happily sadly quietly loudly carefully suddenly again alone together proudly",
    "felt": "happy sad angry afraid proud lonely surprised tired hungry calm worried grateful",
    "near": "under behind beside inside near above below across",
    "food": "soup bread honey berries cheese pancakes plums nuts porridge cake",
    "when": "then later yesterday today tomorrow soon once",
}.items()}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
LESSONS = ["it is better to share", "a small friend can be a great help", "nobody is too old to learn", "a promise must be kept",
           "being brave means being afraid and going on", "good things take time", "the truth is the shortest way home"]


class Storyteller:
    """Writes children's stories of about 700 characters each.

    seed: an integer makes the stories reproducible; None uses the system's randomness, so that no story can be generated again.
    """

    def __init__(self, seed: int | None):
        self.rng = random.SystemRandom() if seed is None else random.Random(seed)

    def word(self, kind: str) -> str:
        """A random word of a kind. Words early in the list are more frequent, as in natural text."""
        words = WORDS[kind]
        return words[int(len(words) * self.rng.random() ** 1.7)]

    def someone(self) -> str:
        """A name from the list or, in 40 % of cases, an invented name that a model can only copy from the context."""
        made_up = self.rng.random() < 0.4
        syllables = (self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(self.rng.randint(2, 3)))
        return "".join(syllables).capitalize() if made_up else self.word("name")

    def thing(self, article: str = "") -> str:
        """A noun phrase such as "a little red kite"."""
        adjectives = [self.word("adjective") for _ in range(self.rng.choice([0, 1, 1, 2]))]
        words = " ".join([*adjectives, self.word("noun")])
        return f"{article or self.rng.choice(['the', 'the', 'a', 'one', 'that'])} {words}"

    def where(self) -> str:
        """A place such as "under the old bridge"."""
        adjective = self.word("adjective") + " " if self.rng.random() < 0.3 else ""
        return f"{self.word('near')} the {adjective}{self.word('place')}"

    def clause(self) -> str:
        """A predicate such as "carried the little red kite across the meadow"."""
        tail = self.rng.choice(["", "", " " + self.where(), " " + self.word("how")])
        return self.rng.choice([self.word("acted"), f"{self.word('did')} {self.thing()}"]) + tail

    def story(self) -> str:
        """One story of three paragraphs."""
        rng, hero, friend, animal = self.rng, self.someone(), self.someone(), self.word("animal")
        he, his = rng.choice([("he", "his"), ("she", "her"), ("it", "its")])
        treasure, place, hiding, feeling = self.thing("the"), self.word("place"), self.where(), self.word("felt")
        trait, numbers = self.word("adjective"), NUMBERS[: rng.randint(2, 9)]

        def line() -> str:
            first, second = self.clause(), self.clause()
            who, other = rng.choice([hero, he.capitalize(), f"The {animal}", friend]), rng.choice([hero, friend, f"the {animal}"])
            return rng.choice([
                f"{who} {first}.", f"{who} {first} and {second}.", f"{who} {first}, but {other} {second}.",
                f"When {other} {first}, {hero} was {feeling}.", f"{who} {first} because {other} {second}.",
                f'"Have you seen {treasure}?" asked {hero}. "No," said {other}, "but I {first} {self.word("when")}."',
                f'"I am {self.word("felt")}," said {other}. "I {first}, and {self.word("when")} I {second}."',
                f"There was {self.thing('a')} {self.where()}, and {hero} {second}.",
                f"{hero} counted {his} {self.word('noun')}s: {', '.join(numbers)}. {numbers[-1].capitalize()} of them!",
                f"They ate {self.word('food')} and {self.word('food')} {self.where()}."])
        opening = rng.choice([
            f"Once upon a time there was a {trait} {animal} named {hero}. {hero} lived near the {place}.",
            f"In a house by the {place} lived {hero}, the {trait} {animal}.",
            f"{hero} was a {animal}, and everybody said that {he} was {trait}."])
        trouble = rng.choice([
            f"One day {treasure} was gone, and {hero} felt {feeling}.", f"More than anything {hero} wanted {treasure}.",
            f'"Bring me {treasure}," said {friend}, "or I will be {feeling}."'])
        finding = rng.choice([
            f"At last {hero} looked {hiding}. There was {treasure}!", f'"Look {hiding}," said {friend}. And there lay {treasure}.'])
        ending = rng.choice([
            f"{hero} thanked {friend} and went home to the {place}.", f"So {hero} gave {treasure} to {friend}.",
            f"After that {hero} the {animal} was never {feeling} again.", f"And {hero} learned that {rng.choice(LESSONS)}."])
        middle = [line() for _ in range(rng.randint(3, 7))]
        after = [line() for _ in range(rng.randint(1, 3))]
        text = "\n\n".join(" ".join(p) for p in ([opening, trouble], middle, [finding, *after, ending]))
        return re.sub(r"\b([Aa]) (?=old|honest)", r"\1n ", text)


def book(seed: int | None, size: int, mark: bytes) -> bytes:
    """Write stories until they have `size` bytes, with `mark` on a line of its own between them. seed: see Storyteller."""
    teller, stories = Storyteller(seed), list[bytes]()
    while size > 0:
        stories.append(teller.story().encode())
        size -= len(stories[-1])
    return (b"\n" + mark + b"\n").join(stories)
