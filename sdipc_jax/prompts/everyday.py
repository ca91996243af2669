"""4,000 captions of everyday things, half of them with words of style, written by a grammar: to fit a converter to."""

import itertools
from collections.abc import Iterator, Sequence
from math import gcd, prod

COUNT = 4000


def listed(words: str) -> tuple[str, ...]:
    """Words that are separated by commas."""
    return tuple(" ".join(word.split()) for word in words.split(","))


ANIMAL = listed(
    """cat, dog, kitten, puppy, horse, cow, sheep, goat, pig, rabbit, squirrel, deer, fox, wolf, bear, lion,
    tiger, elephant, giraffe, zebra, monkey, gorilla, kangaroo, koala, panda, camel, hippo, rhino, otter, seal,
    dolphin, whale, shark, goldfish, octopus, crab, turtle, frog, lizard, snake, crocodile, parrot, owl, eagle,
    duck, swan, chicken, rooster, penguin, flamingo, peacock, sparrow, crow, butterfly, bee, ladybug, spider,
    snail, hedgehog, mouse"""
)
PERSON = listed(
    """man, woman, boy, girl, baby, old man, old woman, young couple, group of friends, father with his son,
    mother with her daughter, doctor, nurse, teacher, student, farmer, chef, waiter, police officer,
    firefighter, soldier, dancer, singer, painter, carpenter, fisherman, cyclist, runner, skier, surfer,
    football player, tennis player, bride, tourist, businessman, scientist, mechanic, gardener, street musician,
    clown"""
)
FOOD = listed(
    """pizza, hamburger, sandwich, bowl of soup, plate of pasta, salad, steak, roast chicken, grilled fish,
    sushi, bowl of rice, omelette, loaf of bread, croissant, pancake, waffle, doughnut, cupcake, chocolate cake,
    apple pie, cookie, ice cream cone, slice of cheese, banana, red apple, orange, lemon, pear, peach,
    pineapple, watermelon, strawberry, bunch of grapes, tomato, carrot, onion, potato, mushroom, broccoli, corn,
    cup of coffee, cup of tea, glass of wine, glass of milk, bottle of water"""
)
THING = listed(
    """chair, table, sofa, bed, lamp, bookshelf, mirror, clock, vase, candle, teapot, kettle, frying pan, knife,
    spoon, basket, bucket, broom, suitcase, backpack, handbag, umbrella, hat, cap, coat, dress, shirt, sweater,
    pair of jeans, pair of shoes, boot, sock, glove, scarf, necklace, ring, watch, pair of glasses, book,
    newspaper, letter, pencil, paintbrush, pair of scissors, laptop, keyboard, telephone, television, camera,
    radio, pair of headphones, guitar, violin, piano, drum, trumpet, football, tennis racket, skateboard, kite,
    doll, teddy bear, toy robot, chess board, key, lock, hammer, saw, ladder, wheel, barrel, box, bottle, jar,
    mug, balloon, flag, globe, statue, bench, fence, mailbox, street lamp, traffic light"""
)
VEHICLE = listed(
    """car, sports car, taxi, bus, truck, van, motorcycle, bicycle, scooter, train, tram, tractor, fire engine,
    ambulance, police car, airplane, helicopter, hot air balloon, rocket, sailboat, fishing boat, ferry, canoe,
    submarine, wagon"""
)
PLACE = listed(
    """beach, forest, mountain, lake, river, waterfall, desert, meadow, field of flowers, garden, park,
    vineyard, island, cliff, cave, volcano, glacier, jungle, swamp, canyon, village, city street, market square,
    harbor, bridge, castle, church, lighthouse, farm, barn, windmill, cottage, skyscraper, train station,
    airport, library, museum, restaurant, kitchen, bedroom, bathroom, living room, office, classroom, hospital,
    factory, gym, swimming pool, stadium, playground"""
)
COLOR = listed(
    "red, orange, yellow, green, blue, purple, pink, brown, black, white, gray, golden, silver, turquoise, beige"
)
KIND = listed(
    """small, big, old, new, broken, shiny, dirty, colorful, striped, round, heavy, cheap, elegant, wooden,
    plastic, glass"""
)
TEMPER = listed(
    "happy, sad, angry, tired, young, old, wet, hungry, playful, proud, fat, thin, wild, brown, white, black"
)
MOTION = listed(
    """sleeping, running, sitting, jumping, eating, drinking water, standing, looking at the camera, lying down,
    hiding, walking in a line, playing with a ball, swimming, looking out of a window"""
)
WORK = listed(
    """reading a book, riding a horse, cooking dinner, talking on the phone, playing the guitar, drinking
    coffee, walking a dog, taking a photo, laughing, crying, sleeping, dancing, waiting for a bus, holding an
    umbrella, carrying a box, writing a letter, playing chess, washing dishes, painting a wall, working at a
    desk, eating ice cream, running, looking at the sea, feeding birds"""
)
WHERE = listed(
    """on a table, on the floor, on a shelf, in a garden, in front of a house, on a white background, in the
    grass, in the snow, on the beach, under a tree, in a kitchen, on a city street, in a box, next to a window,
    by the sea, in the rain, on a mountain, in a museum, at a market, in a field"""
)
WHEN = listed(
    """at night, at sunset, at sunrise, in the morning, in winter, in summer, in autumn, in spring, in the rain,
    in the fog, under a blue sky, under a cloudy sky, during a storm, after the snow, at noon, by moonlight"""
)
NUMBER = listed("two, three, four, five, six, a dozen, many, several")
MEDIUM = listed(
    """photo, black and white photo, close-up photo, blurry photo, aerial photo, old photograph, polaroid,
    drawing, pencil sketch, charcoal drawing, ink drawing, cartoon, comic book panel, watercolor painting, oil
    painting, acrylic painting, pastel painting, woodcut, engraving, stained glass window, mosaic, tapestry,
    embroidery, sculpture, clay figure, origami figure, paper cutout, sticker, icon, logo, emoji, pixel art
    picture, low poly render, 3d render, vector illustration, children's book illustration, poster, postage
    stamp, tattoo, graffiti"""
)
MANNER = listed(
    """minimalist, impressionist, cubist, surrealist, realistic, abstract, art deco, art nouveau, baroque, pop
    art, cyberpunk, steampunk, vintage, retro, gothic, romantic, futuristic, hand-drawn, hyperrealistic,
    psychedelic"""
)
LOOK = listed(
    """highly detailed, soft light, dramatic lighting, bright colors, pastel colors, muted colors, monochrome,
    high contrast, shallow depth of field, wide angle, studio lighting, flat colors, thick outlines, neon
    lights, film grain, blurred background, golden hour, 4k, digital art, concept art"""
)

# What stands in capitals is a list from above; A is an article for the word that follows.
_PLAIN = (
    "A ANIMAL",
    "A TEMPER ANIMAL MOTION",
    "A ANIMAL WHERE",
    "NUMBER birds WHEN",
    "A PERSON WORK",
    "A PERSON WORK WHEN",
    "A COLOR THING",
    "A KIND THING WHERE",
    "A photo of A THING",
    "A FOOD",
    "A FOOD WHERE",
    "A COLOR VEHICLE",
    "A KIND VEHICLE WHEN",
    "A PLACE WHEN",
    "A THING and A FOOD",
    "A ANIMAL next to A THING",
    "A PERSON with A ANIMAL",
    "A VEHICLE near A PLACE",
    "A PERSON in A COLOR coat",
    "A COLOR THING and A COLOR THING",
)
_STYLED = (
    "A MEDIUM of A ANIMAL",
    "A MEDIUM of A PERSON WORK",
    "A MEDIUM of A COLOR THING",
    "A MEDIUM of A FOOD",
    "A MEDIUM of A VEHICLE WHEN",
    "A MEDIUM of A PLACE",
    "A MANNER MEDIUM of A ANIMAL WHERE",
    "A MANNER MEDIUM of A PLACE WHEN",
    "A MANNER picture of A THING",
    "A ANIMAL MOTION, LOOK",
    "A FOOD WHERE, LOOK",
    "A PERSON WORK, MANNER style",
    "A PLACE WHEN, LOOK, MANNER style",
    "A THING, MANNER style, LOOK",
    "A VEHICLE, MEDIUM, LOOK",
    "A MEDIUM of A KIND THING",
)
_LISTS: dict[str, Sequence[str]] = {name: words for name, words in globals().items() if isinstance(words, tuple)}


def everyday_captions(count: int = COUNT) -> tuple[str, ...]:
    """The captions, every second one with words of style; the same ones every time, and none twice.

    >>> everyday_captions(4)
    ('a cat', 'a photo of a cat', 'a happy penguin sleeping', 'a close-up photo of a soldier reading a book')
    """
    kinds = [itertools.islice(_written(templates), count) for templates in (_PLAIN, _STYLED)]
    return tuple(itertools.islice(itertools.chain.from_iterable(zip(*kinds, strict=False)), count))


def _written(templates: Sequence[str]) -> Iterator[str]:
    """The captions of all templates in turn, each template's until it has no more."""
    for row in itertools.count():
        for place, template in enumerate(templates):
            # Those of this template begin elsewhere, so that the templates do not go through the lists in step.
            caption = _caption(template, row, place / len(templates))
            if caption is not None:
                yield caption


def _caption(template: str, row: int, start: float) -> str | None:
    """A template's caption with this number, or None where it has no more."""
    words = template.replace(",", " ,").split()
    total = prod(len(_LISTS[word]) for word in words if word in _LISTS)
    if row >= total:
        return None
    # Steps of about the golden section reach every combination once, and neighbours differ in all their words.
    step = next(step for step in range(round(total * 0.618), 2 * total + 2) if gcd(step, total) == 1)
    number = (row * step + round(start * total)) % total
    chosen: list[str] = []
    for word in reversed(words):
        if word in _LISTS:
            number, index = divmod(number, len(_LISTS[word]))
            word = _LISTS[word][index]
        chosen.append(_article(chosen[-1]) if word == "A" else word)
    return " ".join(reversed(chosen)).replace(" ,", ",")


def _article(following: str) -> str:
    if following in ("broccoli", "corn", "sushi", "many", "grilled fish", "roast chicken", "graffiti"):
        return "some"
    return "an" if following[0] in "aeiou" else "a"
