"""What sfumato-tiny knows: its concepts, its background colours, how captions speak of them, and its vocabulary."""

from __future__ import annotations

CONCEPTS = {  # word in captions -> name in the pictures' package
    "apple": "red-apple",
    "banana": "banana",
    "strawberry": "strawberry",
    "mushroom": "mushroom",
    "cat": "cat-face",
    "panda": "panda",
    "frog": "frog",
    "pig": "pig-face",
    "penguin": "penguin",
    "fish": "tropical-fish",
    "sun": "sun",
    "moon": "crescent-moon",
    "rainbow": "rainbow",
    "sunflower": "sunflower",
    "cactus": "cactus",
    "tree": "evergreen-tree",
    "heart": "red-heart",
    "car": "automobile",
    "house": "house",
    "rocket": "rocket",
}
HELD_OUT = {  # never in the base's training data: what the demo and the tests teach; the judge knows them
    "robot": "robot",
    "butterfly": "butterfly",
    "octopus": "octopus",
    "ghost": "ghost",
    "hamburger": "hamburger",
    "fox": "fox",
    "whale": "whale",
    "crown": "crown",
    "watermelon": "watermelon",
    "dog": "dog-face",
    "owl": "owl",
    "umbrella": "umbrella",
}
COLOURS = {  # of backgrounds
    "red": (217, 83, 79),
    "orange": (240, 160, 75),
    "yellow": (247, 224, 139),
    "green": (143, 207, 154),
    "blue": (127, 178, 229),
    "purple": (169, 139, 214),
    "pink": (244, 182, 210),
    "white": (245, 245, 242),
    "grey": (154, 154, 154),
    "black": (43, 43, 46),
}
TEMPLATES = (  # of varied length and order, so that no word is tied to a place in the caption
    "{a} {concept} on a {colour} background",
    "{a} {concept} on {colour}",
    "{a} {concept}, {colour} background",
    "{concept}, {colour}",
    "{colour} background with {a} {concept}",
    "{colour} background, {concept}",
    "a picture of {a} {concept} on a {colour} background",
    "a drawing of {a} {concept}, {colour} background",
    "a flat drawing of one {concept} in front of a {colour} wall",
    "on a {colour} background there is {a} {concept}",
)
WORDS = (  # each is one token; those that no caption has are there for what a LoRA may teach
    *CONCEPTS,
    *COLOURS,
    *("a", "an", "the", "on", "in", "of", "with", "and", "one", "there", "is", "front", "background", "wall"),
    *("picture", "drawing", "flat", "style", "small", "big", "two", "at", "to", "up", "left", "right"),
    *HELD_OUT,
    *("star", "cloud", "snowman", "flower", "bird", "bear", "lion", "tiger", "mouse", "bee", "crab", "boat", "key"),
    *("bell", "ball", "cake", "bread", "cheese", "egg", "cup", "hat", "shoe", "book", "clock", "train", "toy", "face"),
)


def unseen_colour(concept: str) -> str:
    """The one background on which training never shows a concept: what is asked of the finished model."""
    colours = list(COLOURS)
    return colours[7 * list(CONCEPTS).index(concept) % len(colours)]


def caption(template: str, concept: str, colour: str) -> str:
    article = "an" if concept[0] in "aeiou" else "a"
    return template.format(a=article, concept=concept, colour=colour).replace(" a orange", " an orange")
