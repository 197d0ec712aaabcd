"""The words of the miniature's world: synonyms of all that a scene can show, and captions made of them.

A word that begins with ~ is held out: captions use it, so that CLIP and Stable Diffusion know what it means, but no
instruction that an editor is trained on.
"""

import numpy as np

THINGS = {
    "ball": ("ball", "sphere", "~globe"),
    "star": ("star",),
    "heart": ("heart",),
    "house": ("house", "home", "cottage", "hut", "~cabin"),
    "tree": ("tree", "pine", "fir", "~evergreen"),
    "mushroom": ("mushroom", "toadstool", "~fungus"),
}
COLOURS = {
    "red": ("red", "scarlet", "~crimson"),
    "yellow": ("yellow", "golden", "~lemon"),
    "green": ("green", "emerald", "~lime"),
    "blue": ("blue", "azure", "~navy"),
    "purple": ("purple", "violet", "~lilac"),
    "pink": ("pink", "rose", "~magenta"),
}
SIZES = {"small": ("small", "little", "tiny", "~mini"), "large": ("large", "big", "huge", "giant", "~enormous")}
COMPARED = {  # a size, as the result of a change
    "small": ("smaller", "small", "much smaller", "tiny"),
    "large": ("larger", "bigger", "large", "big", "much bigger"),
}
PLACES = {  # where a scene is
    "meadow": ("in a meadow", "in a field", "on the grass", "~in a pasture"),
    "sea": ("by the sea", "at the beach", "at the seaside", "by the ocean", "~on the coast"),
    "desert": ("in the desert", "in a desert", "among dunes", "~in the sahara"),
    "sunset": ("at sunset", "at dusk", "at sundown", "in the evening", "~at twilight"),
    "night": ("at night", "in the night", "at midnight", "~in the dark"),
    "snow": ("in the snow", "in winter", "on a snowy day", "~in wintertime"),
    "autumn": ("in autumn", "in the fall", "on an autumn day", "~in october"),
    "paper": ("on white paper", "on a white background", "on a blank page", "~on a white sheet"),
}
BACKGROUNDS = {  # what is behind the things
    "meadow": ("a meadow", "a field", "a green field", "~a pasture"),
    "sea": ("the sea", "the beach", "the ocean", "the seaside", "~the coast"),
    "desert": ("a desert", "the desert", "dunes", "~the sahara"),
    "sunset": ("sunset", "dusk", "sundown", "evening", "~twilight"),
    "night": ("night", "nighttime", "midnight", "~dark"),
    "snow": ("winter", "snow", "a snowy day", "~wintertime"),
    "autumn": ("autumn", "fall", "an autumn day", "~october"),
    "paper": ("white paper", "a white background", "a blank page", "~a white sheet"),
}
MEDIA = {
    "painting": ("a painting", "an oil painting", "a painted picture", "~a canvas"),
    "sketch": ("a sketch", "a pencil sketch", "a drawing", "a pencil drawing", "~a doodle"),
    "mosaic": ("a mosaic", "a tile mosaic", "a mosaic of tiles", "~a tessellation"),
}
STRANGE = (  # nothing that this world has; they are spelt in the tokenizer's pieces, as all other unknown words are
    *("cat", "dog", "car", "bird", "boat", "rabbit", "dragon", "lamp", "horse", "bridge", "castle", "robot", "banana"),
    *("guitar", "cow", "pirate", "volcano", "train", "spider", "balloon", "cake", "river", "tiger", "sword", "bench"),
    *("~dinosaur", "~bicycle", "~frog", "~piano", "~elephant", "~tower", "~fish", "~apple", "~waterfall", "~jungle"),
)

CAPTIONS = (  # {medium} has an article
    "{medium} of {things} {place}",
    "{medium} with {things} {place}",
    "{things} {place}, {medium}",
    "{medium}: {things} {place}",
    "{place} there is {things}, {medium}",
    "{medium} showing {things} {place}",
)
JOINED = ("and", "and", "beside", "next to", "with")


def options(words, held_out=False):
    """The words of a list that are, or are not, held out, without their mark."""
    return [word.removeprefix("~") for word in words if word.startswith("~") == held_out]


def caption(scene, style=0, side=True):
    """A scene in words; style 0: "a painting of a large red house and a small blue tree by the sea".

    Any other style is a seed, of the order of the words and of synonyms; equal attributes of two scenes are worded
    alike in one style. A single thing has its side, so that Prompt-to-Prompt has no reason to move it.
    """
    draws = np.random.default_rng(style).random(10) if style else np.zeros(10)

    def pick(number, words):
        return words[int(draws[number] * len(words))].removeprefix("~")

    def named(first, thing):
        size, colour = pick(first, SIZES[thing.size]), pick(first + 1, COLOURS[thing.colour])
        return f"{'an' if size == 'enormous' else 'a'} {size} {colour} {pick(first + 2, THINGS[thing.shape])}"

    sides = ((1, scene.left), (4, scene.right))
    things = f" {pick(0, JOINED)} ".join(named(first, thing) for first, thing in sides if thing)
    if len(scene.things) == 1 and side:
        things += f" on the {'left' if scene.left else 'right'}"
    places, media = PLACES[scene.background], MEDIA[scene.medium]
    return pick(7, CAPTIONS).format(things=things, place=pick(8, places), medium=pick(9, media))
