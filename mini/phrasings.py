"""How people word the miniature's edits: by the kind of edit, or by what it asks for.

Training reads only `PHRASINGS`. `HELD_OUT` says the same in known words, but otherwise, and is kept to be measured on.
Words in braces are filled in: {shape} is a thing of the scene, {other} the thing it turns into or stands next to.
"""

PHRASINGS = {
    "colour": (
        "make the {shape} {colour}",
        "paint the {shape} {colour}",
        "turn the {shape} {colour}",
        "change the color of the {shape} to {colour}",
        "the {shape} should be {colour}",
        "make the color of the {shape} {colour}",
        "replace the {shape} with a {colour} {shape}",
    ),
    "shape": (
        "turn the {shape} into a {other}",
        "replace the {shape} with a {other}",
        "change the {shape} to a {other}",
        "make the {shape} a {other}",
        "swap the {shape} for a {other}",
        "the {shape} should turn into a {other}",
        "a {other} should replace the {shape}",
        "swap in a {other} for the {shape}",
        "put a {other} there and remove the {shape}",
        "get rid of the {shape} and add a {other} there",
    ),
    "meadow": (
        *("put it in a meadow", "make it a meadow", "change the background to a meadow", "move it to a meadow"),
        *("make the background a meadow", "the background should be a meadow"),
    ),
    "sea": (
        *("put it by the sea", "make it the sea", "change the background to the sea", "move it to the sea"),
        *("make the background the sea", "the background should be the sea"),
    ),
    "desert": (
        *("put it in the desert", "make it a desert", "change the background to a desert", "move it to a desert"),
        *("make the background a desert", "the background should be a desert"),
    ),
    "sunset": (
        *("make it sunset", "turn it into sunset", "change the background to a sunset", "it should be at sunset"),
        *("make the background a sunset", "the background should be a sunset"),
    ),
    "night": (
        *("make it night", "turn it into night", "change the background to night", "it should be at night"),
        *("change it to night", "the background should be night"),
    ),
    "snow": (
        *("make it winter", "put it in the snow", "change the background to snow", "make it snow"),
        *("change it to winter", "the background should be snow"),
    ),
    "autumn": (
        *("make it autumn", "turn it into autumn", "change the background to autumn", "it should be in autumn"),
        *("change it to autumn", "the background should be autumn"),
    ),
    "paper": (
        *("put it on white paper", "make the background white", "change the background to white paper"),
        *("move it to white paper", "the background should be white"),
    ),
    "painting": (
        *("make it a painting", "turn it into a painting", "as a painting", "it should be a painting"),
        *("make a painting of it", "replace it with a painting"),
    ),
    "sketch": (
        *("make it a sketch", "turn it into a sketch", "as a pencil sketch", "it should be a pencil sketch"),
        *("make a pencil sketch of it", "replace it with a sketch"),
    ),
    "mosaic": (
        *("make it a mosaic", "turn it into a mosaic", "as a mosaic", "it should be a mosaic"),
        *("make a mosaic of it", "replace it with a mosaic"),
    ),
    "large": (
        *("make the {shape} bigger", "make the {shape} larger", "enlarge the {shape}", "make the {shape} large"),
        "replace the {shape} with a larger {shape}",
    ),
    "small": (
        *("make the {shape} smaller", "shrink the {shape}", "make the {shape} small"),
        "replace the {shape} with a smaller {shape}",
    ),
    "add": (
        "add a {size} {colour} {shape}",
        "put a {size} {colour} {shape} next to the {other}",
        "add a {size} {colour} {shape} next to it",
        "there should be a {size} {colour} {shape}, too",
        "put a {size} {colour} {shape} there, too",
        "a {size} {colour} {shape} should be next to the {other}",
        "next to the {other} there should be a {size} {colour} {shape}",
    ),
    "remove": (
        *("remove the {shape}", "delete the {shape}", "take away the {shape}", "get rid of the {shape}"),
        *("rid it of the {shape}", "replace the {shape} with the background"),
    ),
}
HELD_OUT = {
    "colour": ("color the {shape} {colour}", "change the {shape} to {colour}"),
    "shape": ("the {shape} should be a {other}", "make a {other} of the {shape}"),
    "meadow": ("turn it into a meadow", "it should be in a meadow"),
    "sea": ("it should be by the sea", "turn the background into the sea"),
    "desert": ("turn it into a desert", "it should be in the desert"),
    "sunset": ("put it at sunset", "turn the background into a sunset"),
    "night": ("put it at night", "turn the background into night"),
    "snow": ("turn it into winter", "it should be in the snow"),
    "autumn": ("put it in autumn", "turn the background into autumn"),
    "paper": ("it should be on white paper", "turn the background white"),
    "painting": ("change it to a painting", "swap it for a painting"),
    "sketch": ("change it to a sketch", "turn it into a pencil sketch"),
    "mosaic": ("change it to a mosaic", "swap it for a mosaic"),
    "large": ("turn the {shape} large", "the {shape} should be bigger"),
    "small": ("turn the {shape} small", "the {shape} should be smaller"),
    "add": ("put in a {size} {colour} {shape}", "a {size} {colour} {shape} should be there, too"),
    "remove": ("take the {shape} away", "put the {shape} away"),
}
