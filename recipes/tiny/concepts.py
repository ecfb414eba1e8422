"""What sfumato-tiny knows: its concepts, its background colors, how captions speak of them, and its vocabulary."""

from __future__ import annotations

CONCEPTS = {  # word in captions -> name in the package of drawings
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
NEW_CONCEPTS = {  # never in the base's training data: what the demo and the tests teach; the classifier knows them
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
COLORS = {  # of backgrounds
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
    "{a} {concept} on a {color} background",
    "{a} {concept} on {color}",
    "{a} {concept}, {color} background",
    "{concept}, {color}",
    "{color} background with {a} {concept}",
    "{color} background, {concept}",
    "a picture of {a} {concept} on a {color} background",
    "a drawing of {a} {concept}, {color} background",
    "a flat drawing of one {concept} in front of a {color} wall",
    "on a {color} background there is {a} {concept}",
)
WORDS = (  # each is one token; those that no caption has are there for what a LoRA may teach
    *CONCEPTS,
    *COLORS,
    *("a", "an", "the", "on", "in", "of", "with", "and", "one", "there", "is", "front", "background", "wall"),
    *("picture", "drawing", "flat", "style", "small", "big", "two", "at", "to", "up", "left", "right"),
    *NEW_CONCEPTS,
    *("star", "cloud", "snowman", "flower", "bird", "bear", "lion", "tiger", "mouse", "bee", "crab", "boat", "key"),
    *("bell", "ball", "cake", "bread", "cheese", "egg", "cup", "hat", "shoe", "book", "clock", "train", "toy", "face"),
)


def find_unseen_color(concept: str) -> str:
    """The one background on which training never shows a concept: what is asked of the finished model."""
    colors = list(COLORS)
    return colors[7 * list(CONCEPTS).index(concept) % len(colors)]


def make_caption(template: str, concept: str, color: str) -> str:
    article = "an" if concept[0] in "aeiou" else "a"
    return template.format(a=article, concept=concept, color=color).replace(" a orange", " an orange")
