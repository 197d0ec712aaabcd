"""How people word the miniature's edits: the forms of which wording.py composes requests randomly.

Every kind of edit has forms of its own: imperatives ("do"), a subject and what it should be ("be"), short forms,
negations, two clauses. `WRAPPED` makes requests of the first two: polite ones, wishes, questions, statements.
What begins with ~ is held out: training never uses it, and `evaluate.py world` measures on it. Words in braces:
{thing} "the house", {noun} "house", {old} its colour or size now, {new} "a large red house", {other} "a tree",
{colour}, {bigger} "larger", {place} "at night", {background} "night", {medium} "a sketch", {before} what it is now.
"""

WRAPPED = {  # style: requests of a form's {do}, or of its subject {s} and what that should be, {p}
    "polite": (
        *("please {do}", "{do}, please", "could you {do}?", "can you {do}?", "would you {do}?", "{do} for me"),
        *("could you please {do}?", "would you please {do}?", "please {do}, thank you", "you may {do} now"),
        *("{do}, will you?", "be so kind and {do}", "~would it be too much to {do}?", "~{do}, if you don't mind"),
    ),
    "wish": (
        *("i want you to {do}", "i would like you to {do}", "i want {s} {p}", "i want {s} to be {p}"),
        *("i would like {s} to be {p}", "i'd like {s} to be {p}", "i wish {s} were {p}", "i would love {s} {p}"),
        *("it would be nice if {s} were {p}", "i would prefer {s} to be {p}", "i'd like to see {s} {p}"),
        *("~i'd rather have {s} {p}", "~my wish is that {s} be {p}"),
    ),
    "question": (
        *("could {s} be {p}?", "can {s} be {p}?", "what if {s} were {p}?", "may {s} be {p}?", "can we {do}?"),
        *("why not {do}?", "shall we {do}?", "would {s} look good {p}?", "do you want to {do}?"),
        *("~is it possible to {do}?", "~might {s} be {p}?"),
    ),
    "statement": (
        *("{s} should be {p}", "{s} must be {p}", "{s} has to be {p}", "{s} needs to be {p}", "let {s} be {p}"),
        *("{s} is to be {p}", "{s} shall be {p}", "we need {s} {p}", "you should {do}", "you have to {do}"),
        *("~{s} ought to be {p}", "~from now on {s} is {p}"),
    ),
    "clauses": (
        *("look at the picture and {do}", "take this and {do}", "something is wrong, {do}", "one more thing: {do}"),
        *("here is what i want: {s} should be {p}", "if you can, {do}", "it is nice, but {do}", "i like it, but {do}"),
        *("it is boring, so {do}", "keep the rest and {do}", "{do} and keep the rest as it is"),
        *("{do}, but change nothing else", "~everything else is fine, only {do}", "~do me a favor and {do}"),
    ),
}
FORMS = {
    "colour": {
        "do": (
            *("make {thing} {colour}", "paint {thing} {colour}", "turn {thing} {colour}", "color {thing} {colour}"),
            *("change the color of {thing} to {colour}", "make the color of {thing} {colour}", "dye {thing} {colour}"),
            *("replace {thing} with a {colour} one", "give {thing} a {colour} color", "change {thing} to {colour}"),
            *("give a {colour} color to {thing}", "~coat {thing} in {colour}", "~get {thing} {colour}"),
        ),
        "be": ("{thing}|{colour}", "the color of {thing}|{colour}"),
        "short": (
            *("{colour} {noun}", "{noun} {colour}", "{noun}: {colour}", "{colour} {noun}, please"),
            "{thing} in {colour}",
            *("{thing}, but {colour}", "{colour} for {thing}", "~{colour}, {thing}"),
        ),
        "negation": (
            *("{thing} should not be {old} but {colour}", "no {old} {noun}, a {colour} one"),
            "not {old}, make it {colour}",
            "i don't want a {old} {noun}, i want a {colour} one",
            "{thing} is {old}, which is wrong, make it {colour}",
            *("don't leave {thing} {old}, make it {colour}", "~instead of {old}, {thing} should be {colour}"),
        ),
        "clauses": (
            *("there is {thing}, make it {colour}", "see {thing}? paint it {colour}"),
            "take {thing} and make it {colour}",
            *("find {thing} and paint it {colour}", "~look for {thing} and turn it {colour}"),
        ),
    },
    "shape": {
        "do": (
            *("turn {thing} into {other}", "replace {thing} with {other}", "change {thing} to {other}"),
            *("swap {thing} for {other}", "make {thing} {other}", "change {thing} into {other}"),
            "make {other} of {thing}",
            *("put {other} in place of {thing}", "put {other} where {thing} is"),
            "remove {thing} and add {other} there",
            *("swap in {other} for {thing}", "exchange {thing} for {other}", "transform {thing} into {other}"),
            *("~convert {thing} to {other}", "~have {other} replace {thing}"),
        ),
        "be": ("{thing}|replaced by {other}", "{thing}|turned into {other}", "{thing}|swapped for {other}"),
        "statement": ("{thing} should be {other}", "{thing} should become {other}", "~{thing} is {other} now"),
        "wish": ("i want {thing} to be {other}", "i wish {thing} were {other}"),
        "short": (
            *("{other} for {thing}", "{other} instead of {thing}", "{thing} to {other}", "{other}, not {thing}"),
            *("{thing} out, {other} in", "~{other} in exchange for {thing}"),
        ),
        "negation": (
            *("i don't want {thing}, i want {other}", "not {thing} but {other}", "no {noun}, {other} there"),
            *("{thing} should not be there but {other}", "don't show {thing}, show {other} there"),
            *("instead of {thing} there should be {other}", "~rather than {thing}, draw {other}"),
        ),
        "clauses": (
            *("there is {thing}, turn it into {other}", "take {thing} and make it {other}"),
            "take away {thing}, put {other}",
            *("see {thing}? make it {other}", "get rid of {thing} and put {other} there"),
            "~drop {thing}, draw {other}",
        ),
    },
    "size": {
        "do": (
            *("make {thing} {bigger}", "turn {thing} {bigger}", "change the size of {thing} to {bigger}"),
            *("replace {thing} with a {bigger} one", "draw {thing} {bigger}", "show {thing} {bigger}"),
            *("let {thing} become {bigger}", "change {thing} to a {bigger} one", "~have {thing} {bigger}"),
            "~swap {thing} for a {bigger} one",
        ),
        "be": ("{thing}|{bigger}", "the size of {thing}|{bigger}"),
        "short": (
            *("{bigger} {noun}", "{noun} {bigger}", "{noun}: {bigger}", "{thing}, but {bigger}"),
            "a {bigger} {noun}, please",
            "~{bigger}, {thing}",
        ),
        "negation": (
            *("{thing} should not be so {old}", "{thing} is too {old}"),
            "don't leave {thing} so {old}, make it {bigger}",
            *("not {old}, make {thing} {bigger}", "i don't want {thing} so {old}", "~{thing} mustn't stay {old}"),
        ),
        "clauses": (
            *("there is {thing}, make it {bigger}", "see {thing}? make it {bigger}"),
            "take {thing} and make it {bigger}",
            "~look for {thing} and make it {bigger}",
        ),
    },
    "background": {
        "do": (
            *("make it {background}", "put it {place}", "move it {place}", "change the background to {background}"),
            *("make the background {background}", "turn it into {background}", "set it {place}", "show it {place}"),
            *("replace the background with {background}", "change it to {background}", "place everything {place}"),
            *("turn the background into {background}", "draw it {place}", "~take it to {background}"),
            "~have it {place}",
        ),
        "be": ("it|{place}", "the scene|{place}", "the background|{background}", "everything|{place}"),
        "short": (
            *("{background}", "{place}", "{background}, please", "{place}, please", "now {place}"),
            "background: {background}",
            *("the same {place}", "with {background} behind", "~{background} next", "~{place} this time"),
        ),
        "negation": (
            *("not {before}, {place}", "no longer {before}, make it {background}"),
            "it should not be {before} but {place}",
            *("i don't like it {before}, put it {place}", "~it should stop being {before} and be {place}"),
        ),
        "clauses": (
            *("take all of it and put it {place}", "keep the things and put them {place}"),
            "the things are fine, put them {place}",
            "~leave the things alone and put them {place}",
        ),
    },
    "medium": {
        "do": (
            *("make it {medium}", "turn it into {medium}", "change it to {medium}", "draw it as {medium}"),
            *("show it as {medium}", "make {medium} of it", "make {medium} out of it", "redo it as {medium}"),
            *("swap it for {medium}", "replace it with {medium}", "~convert it to {medium}", "~give me {medium} of it"),
        ),
        "be": (
            *("it|drawn as {medium}", "it|turned into {medium}", "this|shown as {medium}"),
            "everything|turned into {medium}",
        ),
        "statement": ("it should be {medium}", "this should be {medium}", "let it be {medium}", "~it is {medium} now"),
        "wish": ("i want it to be {medium}", "i want {medium}", "i would like {medium}", "i wish it were {medium}"),
        "short": (
            *("as {medium}", "{medium}", "{medium}, please", "{medium} of it", "the same as {medium}", "now {medium}"),
            "~{medium} next",
        ),
        "negation": (
            *("not {before} but {medium}", "it should not be {before} but {medium}"),
            "no longer {before}, make it {medium}",
            *("i don't want {before}, i want {medium}", "~anything but {before}, say {medium}"),
        ),
        "clauses": (
            *("take it and make it {medium}", "keep the things and draw them as {medium}"),
            "it is fine, but make it {medium}",
            "~leave the things alone and show them as {medium}",
        ),
    },
    "add": {
        "do": (
            *("add {new}", "put {new} next to {thing}", "add {new} next to {thing}", "put {new} beside {thing}"),
            *("add {new} beside {thing}", "draw {new} there, too", "place {new} next to {thing}"),
            "put {new} there, too",
            *("put in {new}", "next to {thing} put {new}", "give {thing} {new} as company", "insert {new}"),
            *("~include {new}", "~let {new} join {thing}", "~beside {thing} draw {new}"),
        ),
        "be": ("{new}|next to {thing}", "{new}|there, too", "{new}|beside {thing}", "{new}|added"),
        "short": (
            *("{new}, too", "and {new}", "plus {new}", "{new} next to {thing}", "{new}, please", "with {new}"),
            *("now with {new}", "~{new} as well"),
        ),
        "negation": (
            *("{thing} should not be alone, add {new}", "there is no {kind}, add {new}"),
            "it is not complete without {new}",
            *("don't leave {thing} alone, add {new}", "~{thing} has no company, {new} would do"),
        ),
        "clauses": (
            *("there is {thing}, put {new} next to it", "see {thing}? add {new}"),
            "look at {thing} and put {new} beside it",
            *("there should be {new}, too", "next to {thing} there should be {new}", "~where {thing} is, add {new}"),
        ),
    },
    "remove": {
        "do": (
            *("remove {thing}", "delete {thing}", "take away {thing}", "get rid of {thing}", "take {thing} away"),
            *("erase {thing}", "take {thing} out", "make {thing} disappear", "drop {thing}", "leave out {thing}"),
            *("let {thing} vanish", "~throw {thing} out", "~wipe {thing} away", "~cut {thing}"),
        ),
        "be": ("{thing}|gone", "{thing}|removed", "{thing}|away", "{thing}|deleted"),
        "short": (
            *("no {noun}", "without {thing}", "minus {thing}", "no {noun}, please", "{thing} away", "~less {thing}"),
            "~{thing} out",
        ),
        "negation": (
            *("i don't want {thing}", "there should be no {noun}", "don't show {thing}", "{thing} should not be there"),
            *("i don't need {thing}", "no more {noun}", "i do not like {thing}, remove it"),
            "~never mind {thing}, erase it",
        ),
        "clauses": (
            *("see {thing}? remove it", "there is {thing}, take it away", "find {thing} and remove it"),
            "~{thing} is in the way, lose it",
        ),
    },
}
BY_SIDE = (  # {thing} where a thing is named by its place
    *("the one on the {side}", "the thing on the {side}", "the {side} one", "the {side} thing"),
    "what is on the {side}",
    *("the object on the {side}", "the one at the {side}", "~whatever is on the {side}", "~the {side} object"),
)
TWO = {  # style: two requests in one
    "plain": (
        *("{one} and {two}", "{one}, then {two}", "{one} and also {two}", "{one}; {two}", "~{one}. after that {two}"),
    ),
    "polite": (
        *("please {one} and {two}", "could you {one} and {two}?", "{one} and {two}, please"),
        "~would you {one} and {two}?",
    ),
    "wish": ("i want you to {one} and {two}", "i would like you to {one} and {two}", "~my wish: {one} and {two}"),
    "clauses": (
        *("first {one}, then {two}", "{one}, and when that is done, {two}", "two things: {one} and {two}"),
        "~both {one} and {two}",
    ),
}
NOTHING = (  # asked for nothing
    *("leave it as it is", "do nothing", "change nothing", "keep it as it is", "do not change anything", "no change"),
    *("it is fine as it is", "keep everything the same", "don't change anything, please", "it is perfect", "nothing"),
    *("leave everything alone", "it should stay as it is", "please keep it like this", "i like it as it is"),
    *("~don't touch it", "~all is well", "~let it stay the same", "~no edit, please"),
)
STRANGE_REQUESTS = (  # for what this world does not have
    *("add a {strange}", "turn {thing} into a {strange}", "put a {strange} next to {thing}"),
    "replace {thing} with a {strange}",
    *("make it a {strange}", "remove the {strange}", "make the {strange} {colour}", "there should be a {strange}"),
    "a {strange}",
    *("could there be a {strange}?", "i want a {strange}", "put it on a {strange}", "~draw a {strange}"),
    "~swap {thing} for a {strange}",
)
FILLERS = ("just", "now", "ok,", "hey,", "so", "well,", "hmm", "um,", "hello,", "yes,", "oh,", "actually,", "maybe")
