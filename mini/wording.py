"""Word an edit as people would: a request composed randomly of the forms in phrasings.py and the words in words.py."""

import re
from string import Formatter

from mini.phrasings import BY_SIDE, FILLERS, FORMS, NOTHING, STRANGE_REQUESTS, TWO, WRAPPED
from mini.words import BACKGROUNDS, CAPTIONS, COLOURS, COMPARED, JOINED, MEDIA, PLACES, SIZES, STRANGE, THINGS, options

CLASSES = ("template", "trained", "new")  # of wordings: plain imperatives; all that training uses; what is held out
STYLES = ("plain", "polite", "wish", "question", "statement", "clauses", "negation", "short", "filler", "typo")
FILLED, TYPO = 0.08, 0.08  # how often a request has a word that means nothing here, or a typo


def word(rng, kind, words, wording="trained"):
    """A request for an edit: (text, style). kind: as in world.py; words: what it is about, see `slots_of`.

    wording: one of CLASSES; of what is held out, "new" has a construction or all the words that there are.
    """
    new = pick(rng, ("form", "words")) if wording == "new" else None
    if wording == "template":
        return compose(rng, kind, words, "plain", plain=True), "plain"
    if new == "words" and slots_of(words, held_out=True) == slots_of(words):  # has no synonyms, as "star"
        new = "form"
    text = None
    while text is None:
        style = pick(rng, STYLES[:8])
        text = compose(rng, kind, words, style, new)
    return dress(rng, text, style)


def canonical(kind, words):
    """The one plainest request for an edit; "" for no change at all."""
    return "" if kind == "nothing" else compose(First(), kind, words, "plain", plain=True)


class First:
    """In place of a random generator: always the first one."""

    def integers(self, high):
        """0."""
        return 0


def compose(rng, kind, words, style, new=None, plain=False):
    """A request in one of the first eight styles, in small letters; None if no form of the kind has that style."""
    slots = slots_of(words, new == "words", plain)
    if kind == "nothing":
        if style != "plain":
            return None
        templates = STRANGE_REQUESTS if "strange" in words else NOTHING
        return fill(rng, pick(rng, usable(templates, slots, new == "form")), slots)
    templates = TWO.get(style, ()) if kind == "two" else (*FORMS[kind].get(style, ()), *WRAPPED.get(style, ()))
    if style == "plain" and kind != "two":
        templates = FORMS[kind]["do"]
    templates = usable(templates, slots, new == "form")
    if not templates:
        return None
    if kind == "two":
        parts = {name: compose(rng, *words[name], "plain", new if new == "words" else None, plain) for name in words}
        return (templates[0] if plain else pick(rng, templates)).format(**parts)
    template = pick(rng, templates)
    subject, predicate = pick(rng, usable(FORMS[kind]["be"], slots)).split("|")
    template = template.replace("{do}", pick(rng, usable(FORMS[kind]["do"], slots)))
    return fill(rng, template.replace("{s}", subject).replace("{p}", predicate), slots)


def slots_of(words, held_out=False, plain=False):
    """What stands for the words in braces of a form: {name: a list of texts}.

    words, as far as the edit has them: shape (of the thing it is about), of_colour (its colour), side (to name it by),
    old (its colour or size), colour, size, other (a shape), background, medium: as they shall be; before: the
    background or medium now; new: (size, colour, shape); strange. held_out: with those synonyms, where there are any.
    """

    def synonyms(table, key):
        found = options(table[key], held_out) or options(table[key])
        return found[:1] if plain else found

    slots = {}
    if "shape" in words:
        slots["noun"] = synonyms(THINGS, words["shape"])
        slots["thing"] = [f"the {noun}" for noun in slots["noun"]]
        if "of_colour" in words and not plain:
            slots["thing"] += [f"the {words['of_colour']} {noun}" for noun in slots["noun"]]
    if "side" in words:
        named = [form.format(side=words["side"]) for form in options(BY_SIDE, held_out)]
        slots = {"thing": named[:1] if plain else named}
    tables = {"colour": COLOURS, "background": BACKGROUNDS, "place": PLACES, "medium": MEDIA, "bigger": COMPARED}
    keys = {"place": "background", "bigger": "size"}
    for name, table in tables.items():
        if keys.get(name, name) in words:
            slots[name] = synonyms(table, words[keys.get(name, name)])
    if "other" in words:
        slots["other"] = [f"a {noun}" for noun in synonyms(THINGS, words["other"])]
    if "new" in words:
        size, colour, shape = (synonyms(*pair) for pair in zip((SIZES, COLOURS, THINGS), words["new"], strict=True))
        slots["new"] = [f"a {s} {c} {t}" for s in size for c in colour for t in shape]
        slots["kind"] = options(THINGS[words["new"][2]])[:1]
    if "strange" in words:
        slots["strange"] = options(STRANGE, held_out)
    return slots | {name: [words[name]] for name in ("old", "before") if name in words}


def all_words():
    """The texts that training's words come from, once each: what the tokenizer should know as whole words."""
    tables = (THINGS, COLOURS, SIZES, COMPARED, PLACES, BACKGROUNDS, MEDIA)
    forms = [form for kinds in FORMS.values() for form in kinds.values()]
    known = [BY_SIDE, FILLERS, NOTHING, STRANGE_REQUESTS, *TWO.values(), *WRAPPED.values(), *forms]
    known = [text for texts in known for text in options(texts)]
    captions = [word.removeprefix("~") for table in tables for texts in table.values() for word in texts]
    return [re.sub(r"[{}|]", " ", text) for text in (*known, *captions, *CAPTIONS, *JOINED, "left right the on an")]


def pick(rng, values):
    """One of the values, randomly."""
    return values[int(rng.integers(len(values)))]


def usable(templates, slots, held_out=False):
    """Those templates, held out or not, whose words in braces `slots` has."""
    known = {*slots, "do", "s", "p", "one", "two"}
    return [template for template in options(templates, held_out) if in_braces(template) <= known]


def in_braces(template):
    """The names in braces of a template."""
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def fill(rng, template, slots):
    """Put words in the braces of a template; "a azure ball" becomes "an azure ball"."""
    text = template.format(**{name: pick(rng, slots[name]) for name in sorted(in_braces(template))})
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def dress(rng, text, style):
    """Give a request what people add: capitals and marks, rarely a word that means nothing, or a typo."""
    if rng.random() < FILLED and text:
        text, style = f"{pick(rng, FILLERS)} {text}", "filler"
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if rng.random() < TYPO and long:
        index = pick(rng, long)
        words[index], style = mistyped(rng, words[index]), "typo"
    text = " ".join(words)
    if rng.random() < 0.3:
        text = text[:1].upper() + text[1:]
    if text[-1:].isalpha() and rng.random() < 0.25:
        text += pick(rng, (".", ".", "!"))
    return text, style


def mistyped(rng, word):
    """A word with two letters swapped, one left out, or one doubled; the first one is always right."""
    at, way = int(rng.integers(1, len(word) - 1)), pick(rng, ("swap", "drop", "double"))
    middle = {"swap": word[at + 1] + word[at], "drop": word[at + 1], "double": word[at] + word[at] + word[at + 1]}
    return word[:at] + middle[way] + word[at + 2 :]
