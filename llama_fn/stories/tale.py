"""A story for children, told by a chain of choices: the probabilistic grammar of the embedded corpus.

`tell` is the grammar. What was chosen stays true to the end: names, pronouns, colors, things, homes, places and deeds
come back many sentences later, so a model has to attend to all of the story. The text shows each choice soon after it
is made, and different choices make different texts, so `grammar.py` can find the choices in a text.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

GIRLS = ("Lily", "Mia", "Anna", "Rosa", "Nora", "Ella", "Ruby", "Zoe")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Finn", "Omar")
TRAITS = ("kind", "brave", "shy", "clever", "happy", "quiet", "curious", "funny")
GIRL_FRIENDS = ("Daisy", "Luna", "Poppy", "Bella")
BOY_FRIENDS = ("Bruno", "Oscar", "Rusty", "Felix")
ANIMALS = ("rabbit", "bear", "fox", "mouse", "duck", "cat", "goat", "frog")
COLORS = ("red", "blue", "green", "yellow", "white", "purple", "pink", "golden")
THINGS = ("ball", "kite", "hat", "boat", "drum", "scarf", "cup", "lamp")
HOMES = ("a small house", "an old mill", "a tall tower", "a cozy hut")
LANDS = ("by the sea", "near the forest", "on a hill", "in the green valley")
FAMILY = ("mother", "father", "grandmother", "brother", "sister", "uncle")
SKIES = ("sunny", "windy", "cloudy", "cold")
TIMES = ("morning", "day", "evening", "afternoon")
PLACES = ("the park", "the beach", "the river", "the market", "the garden", "the bridge", "the meadow", "the lake")
FOODS = ("bread", "soup", "apple pie", "honey cake")

# Where a thing may be lost, and how a friend brings it back.
LOST = (("up into a tall tree", "climbed the tree"), ("down into a deep hole", "crawled into the hole"),
        ("into the cold water", "swam through the water"), ("over a high wall", "jumped over the wall"))
# What a friend may suffer from, and the gift that helps.
NEEDS = (("hungry", "a piece of bread"), ("thirsty", "a bottle of milk"), ("cold", "a warm blanket"),
         ("tired", "a soft pillow"))
# What may be found, and what may be inside.
FOUND = ("a little box", "an old bag", "a wooden chest", "a round basket")
INSIDE = ("a shiny key", "a silver bell", "a tiny book", "a bright stone")


class Voice(NamedTuple):
    """How a story is told: `choose` picks one of equally likely options, and `say` appends to the text."""

    choose: Callable[[Sequence], Any]
    say: Callable[[str], None]

    def either(self, *options: str) -> None:
        """Say one of the options."""
        self.say(self.choose(options))


class Person(NamedTuple):
    """A person in the story, with the pronouns for them: "she", "her" (her bed), and "her" (to her)."""

    name: str
    kind: str
    she: str
    her: str
    to_her: str


def tell(voice: Voice) -> None:
    """Tell one story: the hero, a dear thing, a friend met on the way, one of three adventures, and the way home."""
    hero = introduce(voice)
    home = settle(voice, hero)
    thing = treasure(voice, hero)
    place = go_out(voice, hero, thing)
    friend = meet(voice, hero)
    deed = voice.choose((lose, give, find))(voice, hero, friend, thing)
    play(voice, hero, friend, thing, place)
    go_home(voice, hero, home, deed)
    end(voice, hero, friend, thing)


def introduce(voice: Voice) -> Person:
    """Say who the hero is."""
    voice.either("Once upon a time", "Long ago", "Many years ago")
    voice.say(f" there was a {voice.choose(TRAITS)}")
    kind, names, words = voice.choose((("girl", GIRLS, ("she", "her", "her")), ("boy", BOYS, ("he", "his", "him"))))
    voice.either(f" little {kind}", f" young {kind}")
    name = voice.choose(names)
    voice.either(f" named {name}.", f" called {name}.")
    return Person(name, kind, *words)


def settle(voice: Voice, hero: Person) -> str:
    """Say where the hero lives; returns a short name of the home."""
    home, land = voice.choose(HOMES), voice.choose(LANDS)
    voice.say(f" {hero.she.title()} lived in {home} {land} with {hero.her} {voice.choose(FAMILY)}.")
    return f"{home.split()[-1]} {land}"


def treasure(voice: Voice, hero: Person) -> str:
    """Say which thing the hero loves; returns the thing."""
    thing = f"{voice.choose(COLORS)} {voice.choose(THINGS)}"
    voice.either(f" {hero.name} had a {thing} and took it everywhere.",
                 f" {hero.she.title()} loved {hero.her} {thing} very much.",
                 f" Of all things, {hero.she} liked {hero.her} {thing} most.")
    return thing


def go_out(voice: Voice, hero: Person, thing: str) -> str:
    """Say where the hero takes the thing; returns the place."""
    voice.say(f" One {voice.choose(SKIES)} {voice.choose(TIMES)},")
    place = voice.choose(PLACES)
    voice.either(f" {hero.name} went to {place} with the {thing}.", f" {hero.she} took the {thing} to {place}.",
                 f" {hero.name} carried the {thing} to {place}.")
    return place


def meet(voice: Voice, hero: Person) -> Person:
    """Say which friend the hero meets there; returns the friend."""
    voice.either(f" There {hero.she} met", f" There {hero.name} saw", f" On the way {hero.she} found")
    kind = voice.choose(ANIMALS)
    voice.say(f" a {voice.choose(TRAITS)} {kind}")
    names, words = voice.choose(((GIRL_FRIENDS, ("she", "her", "her")), (BOY_FRIENDS, ("he", "his", "him"))))
    name = voice.choose(names)
    friend = Person(name, kind, *words)
    voice.either(f" named {name}.", f" called {name}.")
    voice.either(f' "Hello, {hero.name}," said the {kind}.', f" {friend.she.title()} smiled at {hero.name}.",
                 f' "Will you play with me?" asked {name}.')
    return friend


def lose(voice: Voice, hero: Person, friend: Person, thing: str) -> str:
    """Tell how the thing is lost and how the friend brings it back; returns this deed."""
    voice.either(" Suddenly", " But then", " All at once")
    where, rescue = voice.choose(LOST)
    voice.either(f" the wind blew the {thing} {where}.", f" the {thing} fell {where}.")
    voice.either(f" {hero.name} began to cry.", f" {hero.she.title()} was very sad.",
                 f" {hero.name} did not know what to do.")
    voice.either(f' "Do not worry, {hero.name}," said {friend.name}.', f' "I can help you," said the {friend.kind}.')
    voice.say(f" {friend.she.title()} {rescue} and brought back the {thing}.")
    voice.either(f' "Thank you, {friend.name}!" said {hero.name}.', f" {hero.name} hugged the {friend.kind}.")
    return f"the {friend.kind} {rescue}"


def give(voice: Voice, hero: Person, friend: Person, thing: str) -> str:
    """Tell what the friend needs and what the hero gives; returns this deed."""
    need, gift = voice.choose(NEEDS)
    voice.either(f" The {friend.kind} was very {need}.", f' "I am so {need}," said {friend.name}.')
    voice.either(f" {hero.name} wanted to help.", f" {hero.name} thought for a while.",
                 f' "Wait here," said {hero.name}.')
    voice.either(f" So {hero.she} gave {friend.to_her} {gift}.",
                 f" Then {hero.she} came back with {gift} for {friend.to_her}.")
    voice.either(f' "Now I am not {need} anymore," said {friend.name}.',
                 f' "Thank you, {hero.name}!" said the {friend.kind}.')
    return f"{hero.name} gave the {friend.kind} {gift}"


def find(voice: Voice, hero: Person, friend: Person, thing: str) -> str:
    """Tell what the two find and who keeps it; returns this deed."""
    found, inside = voice.choose(FOUND), voice.choose(INSIDE)
    noun = found.split()[-1]
    voice.either(f" Together they found {found}.", f" Behind a rock they saw {found}.", f" Under a bush lay {found}.")
    one, other = voice.choose(((hero, friend), (friend, hero)))
    voice.either(f" {one.name} opened the {noun}, and inside was {inside}.",
                 f" When {one.name} looked into the {noun}, there was {inside}.")
    voice.either(f' "You may keep it, {one.name}," said {other.name}.',
                 f" {other.name} was as glad as {one.name}.")
    return f"they found {inside} in {found}"


def play(voice: Voice, hero: Person, friend: Person, thing: str, place: str) -> None:
    """Tell how the two play with the thing."""
    voice.either(" After that,", " Then", " Soon")
    voice.either(f" {hero.name} and {friend.name} played with the {thing} near {place}",
                 f" the {friend.kind} and the {hero.kind} sat in the grass near {place}",
                 f" they danced around the {thing} near {place}")
    voice.either(" until the sun went down.", " and laughed a lot.", " for a long time.", " and sang a song.")


def go_home(voice: Voice, hero: Person, home: str, deed: str) -> None:
    """Tell how the hero comes home and reports the deed."""
    voice.either(" When it was dark,", " At last", " In the end")
    voice.either(f" {hero.name} went back to the {home}.", f" {hero.she} walked home to the {home}.")
    voice.say(f" At dinner there was {voice.choose(FOODS)},")
    voice.either(f" and {hero.she} told how {deed}.", f" and everybody heard that {deed}.")


def end(voice: Voice, hero: Person, friend: Person, thing: str) -> None:
    """Tell what becomes of the friendship or the thing, and say the last words."""
    voice.either(f" That night {hero.name} dreamed of {friend.name} the {friend.kind}.",
                 f" {hero.name} put the {thing} next to {hero.her} bed and fell asleep.",
                 f" {hero.name} and {friend.name} stayed friends forever.",
                 f" From that day on, {hero.she} shared the {thing} with {friend.name} the {friend.kind}.")
    voice.either(" The end.", " And they were happy.", " Good night!")
