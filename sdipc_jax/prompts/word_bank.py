"""A few thousand everyday words and phrases: what pictures are told in where no other list is given."""

from functools import cache
from pathlib import Path

from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import read_lines
from sdipc_jax.prompts import everyday
from sdipc_jax.prompts.everyday import listed

_MOST = 100_000

# What the lists that captions are written from lack.
_ANIMALS = listed(
    """alligator, ant, antelope, armadillo, badger, bat, beaver, beetle, bison, boar, buffalo, bull, calf, canary,
    caterpillar, cheetah, chick, chimpanzee, chipmunk, clownfish, cobra, cockroach, cricket, dinosaur, donkey,
    dove, dragon, dragonfly, eel, emu, falcon, ferret, fish, flock of sheep, fly, gecko, gerbil, goose,
    grasshopper, guinea pig, hamster, hawk, hen, heron, hummingbird, hyena, iguana, insect, jaguar, jellyfish,
    kingfisher, lamb, leopard, lobster, llama, lynx, macaw, mammoth, meerkat, mole, moose, mosquito, moth, mule,
    octopus, orangutan, ostrich, ox, pelican, pigeon, piglet, platypus, polar bear, pony, porcupine, pufferfish,
    puffin, quail, raccoon, ram, rat, raven, reindeer, robin, salamander, salmon, scorpion, sea horse, sea lion,
    shrimp, skunk, sloth, slug, squid, starfish, stork, swallow, t-rex, tadpole, toad, toucan, tropical fish,
    trout, turkey, unicorn, vulture, walrus, wasp, weasel, wild boar, woodpecker, worm, yak, bird, bird of prey,
    herd of cows, school of fish, pet, wild animal, farm animal, paw prints, feather, nest, egg, shell, coral,
    spider web, horns, tail, wings, beak, fur, scales"""
)
_PEOPLE = listed(
    """child, children, toddler, teenager, adult, grandmother, grandfather, family, crowd, couple, person, girl with
    long hair, man with a beard, bald man, woman with red hair, blond woman, person with curly hair, pregnant
    woman, king, queen, prince, princess, knight, pirate, ninja, samurai, cowboy, astronaut, pilot, sailor, judge,
    lawyer, detective, spy, magician, wizard, witch, fairy, elf, vampire, zombie, genie, mermaid, angel, superhero,
    villain, monk, nun, priest, dentist, surgeon, engineer, programmer, photographer, journalist, hairdresser,
    butcher, baker, tailor, plumber, electrician, miner, welder, athlete, boxer, wrestler, swimmer, golfer,
    basketball player, gymnast, skater, climber, rower, juggler, acrobat, ballerina, drummer, guitarist, DJ, Santa
    Claus, snowman, skeleton, robot, alien, monster, ghost, ogre, mummy, person in a suit, person in uniform,
    person in a wheelchair, person with a cane, guard, bride and groom, best friends, baby in a stroller, shopper,
    hiker, beggar, model, politician, player, team"""
)
_BODIES_AND_GESTURES = listed(
    """face, smiling face, laughing face, crying face, angry face, sleepy face, frightened face, surprised face,
    kissing face, winking face, face with sunglasses, face with a hat, face with tears of joy, face with hearts,
    sick face, face with a mask, yellow face, eye, eyes, nose, mouth, lips, tongue, tooth, teeth, ear, hair, beard,
    moustache, hand, open hand, raised fist, finger, pointing finger, thumbs up, thumbs down, clapping hands,
    waving hand, folded hands, handshake, victory sign, crossed fingers, arm, strong arm, leg, foot, knee,
    shoulder, back, chest, bone, brain, heart, lungs, skull, footprints, skin, light skin, dark skin, medium skin,
    nail polish, tears, smile, portrait, profile, silhouette, hug, kiss, shrug, bow, salute"""
)
_PLANTS = listed(
    """tree, palm tree, pine tree, christmas tree, oak, birch, willow, bush, hedge, cactus, fern, moss, grass, herb,
    leaf, maple leaf, fallen leaves, four-leaf clover, flower, rose, tulip, sunflower, daisy, cherry blossom,
    hibiscus, lotus, lily, orchid, poppy, lavender, dandelion, bouquet, wilted flower, potted plant, seedling,
    bamboo, vine, ivy, branch, log, stump, root, seed, acorn, pine cone, wheat, hay, wreath, seaweed, lily pad,
    thorn, petal, blossom"""
)
_FOODS = listed(
    """apple, green apple, apricot, avocado, bacon, bagel, baguette, bean, beer, bell pepper, birthday cake,
    blueberry, bread, breakfast, burrito, butter, cabbage, candy, candy bar, caramel, cauliflower, celery,
    champagne, cheese, cherry, cherries, chestnut, chili pepper, chips, chocolate, coconut, cocktail, cotton candy,
    cream, cucumber, curry, custard, dessert, dumpling, eggplant, falafel, fig, fondue, french fries, fried egg,
    fried shrimp, fruit, garlic, ginger, grapes, gravy, ham, honey, honey pot, hot chocolate, hot dog, ice cream,
    jam, juice, kebab, kiwi, lasagna, lemonade, lettuce, lime, lollipop, lunch box, mango, marshmallow, meat,
    meatball, melon, milk, milkshake, moon cake, muffin, mustard, noodles, nuts, olive, olive oil, orange juice,
    oyster, pancakes, papaya, paella, parsley, pasta, peanuts, peas, pepper, pie, pickle, plum, pomegranate,
    popcorn, popsicle, pretzel, pudding, pumpkin, radish, raspberry, rice, rice ball, salt, sandwich, sausage,
    seafood, shaved ice, smoothie, soda, soup, spaghetti, spinach, steak, stew, sugar, sushi roll, sweet potato,
    syrup, taco, tea, toast, tofu, tray of food, vegetable, whipped cream, whisky, wine, yogurt, zucchini, bottle
    with popping cork, glass, chopsticks, fork and knife, plate, bowl, picnic, feast"""
)
_THINGS = listed(
    """abacus, accordion, alarm clock, anchor, apron, aquarium, armchair, arrow, axe, baby bottle, badge, bag,
    bandage, banjo, barbecue, baseball, baseball bat, basketball, bathtub, battery, bell, belt, bikini, billiard
    ball, binoculars, bird cage, blanket, blouse, boomerang, bow and arrow, bow tie, bowling ball, bowling pins,
    bracelet, brick, briefcase, bulb, button, cable, calculator, calendar, cane, cannon, card, cardboard box,
    carpet, cash register, cauldron, ceramic bowl, chain, chandelier, cigarette, clamp, clapper board, clipboard,
    coin, comb, compass, computer, computer mouse, confetti, cork, corkscrew, crayon, credit card, crib, crown,
    crystal ball, cup, curtain, cushion, dagger, dart board, desk, diamond, dice, diploma, disco ball, dishwasher,
    door, door handle, dumbbell, earring, easel, engagement ring, envelope, eraser, fan, faucet, file folder, film,
    fire extinguisher, firecracker, fireworks, fireplace, fishing rod, flashlight, floppy disk, flute, flying disc,
    fork, fountain pen, frame, fridge, funnel, game controller, gas pump, gavel, gear, gem, gift, goggles, golf
    club, graduation cap, grill, hair dryer, hairbrush, hammock, handcuffs, hanger, harp, helmet, high-heeled shoe,
    hockey stick, hole, hook, horseshoe, hourglass, ice cube, ice skate, ink, iron, ivory comb, jack-o-lantern,
    jacket, jewel, joystick, jug, kimono, knitting needles, knot, lab coat, label, lantern, lawn mower, leather
    bag, light bulb, lipstick, loudspeaker, luggage, magic wand, magnet, magnifying glass, map, mask, match, medal,
    megaphone, microphone, microscope, microwave, mirror ball, mittens, money, money bag, moneybox, monitor, mop,
    mousetrap, music box, musical note, nail, necktie, needle, net, notebook, oar, oil drum, oven, padlock, paint
    bucket, paint roller, palette, paper, paper clip, paper lantern, parachute, passport, pen, perfume, petri dish,
    phone, picture frame, pill, pillow, pipe, plug, plunger, pocket knife, pot, present, printer, prism, projector,
    puppet, purse, puzzle piece, pyramid, racket, razor, receipt, record player, refrigerator, remote control,
    ribbon, rifle, robe, roller skate, rolling pin, rope, rosary, rubber duck, rug, ruler, sack, saddle, safe,
    safety pin, sandal, satellite dish, saucer, saxophone, scale, screen, screw, screwdriver, scroll, sewing
    machine, sheet, shield, shopping bag, shopping cart, shorts, shovel, shower, sign, sink, ski, skirt, sled,
    slide, sleeping bag, slipper, smartphone, snowboard, snow globe, soap, sofa cushion, soccer ball, spade,
    sponge, spray can, stapler, stethoscope, sticky note, stool, stove, straw hat, string, sunglasses, surfboard,
    swing, sword, syringe, t-shirt, tambourine, tape, target, telescope, tent, test tube, thermometer, thread,
    throne, ticket, tire, tissue box, toaster, toilet, toilet paper, tool box, toothbrush, top hat, torch, towel,
    toy, toy car, tray, treasure chest, tripod, trophy, trousers, tuba, turban, typewriter, ukulele, vacuum
    cleaner, veil, vest, video camera, video game, volleyball, wallet, washing machine, watering can, wheelbarrow,
    wheelchair, whistle, wig, window, wine glass, wool, wrench, x-ray, yarn, yo-yo, zipper"""
)
_SIGNS = listed(
    """arrow pointing left, arrow pointing right, arrow pointing up, arrow pointing down, circle, square, triangle,
    star, heart shape, broken heart, two hearts, cross, check mark, question mark, exclamation mark, plus sign,
    minus sign, letter, number, word, alphabet, punctuation, percent sign, dollar sign, copyright sign, no entry
    sign, no smoking sign, stop sign, warning sign, recycling sign, radioactive sign, peace sign, yin and yang,
    infinity sign, zodiac sign, musical notes, speech bubble, thought bubble, play button, clock face, bar chart,
    chart going up, chart going down, map with a pin, barcode, diagram, dotted line, spiral, stripes, dots,
    pattern, checkered flag, rainbow flag, white flag, button with a letter, blue circle, red circle, black square,
    white square, sparkles, dizzy symbol, anger symbol, collision, zzz, 1st place medal, playing card, chess pawn,
    domino, mahjong tile"""
)
_VEHICLES = listed(
    """racing car, pickup truck, convertible, limousine, delivery truck, garbage truck, cement mixer, crane,
    bulldozer, excavator, forklift, school bus, trolleybus, minibus, camper, trailer, mountain bike, motor scooter,
    auto rickshaw, unicycle, monorail, steam locomotive, high-speed train, subway, cable car, ski lift, ship,
    cruise ship, speedboat, rowing boat, raft, yacht, warship, tank, jet fighter, biplane, glider, drone, space
    shuttle, satellite, flying saucer, sleigh, stroller, carriage, cart, elevator, escalator, traffic jam, wheel,
    engine, oil tanker, container ship"""
)
_PLACES = listed(
    """airfield, alley, amusement park, apartment building, aquarium hall, arena, attic, balcony, bank, bakery, bar,
    bay, bookstore, building, bus stop, cafe, camp site, canal, carnival, carousel, cathedral, cemetery, city, city
    skyline, classical building, coast, construction site, corridor, courtyard, creek, crossroads, dam, dock,
    downtown, dunes, ferris wheel, fire station, fjord, fountain, gallery, garage, gas station, gate, geyser,
    grave, greenhouse, hallway, highway, hill, home, hotel, house, houses, hut, igloo, japanese castle, japanese
    garden, laboratory, lagoon, mall, mansion, mosque, monastery, monument, national park, night sky, nightclub,
    oasis, ocean, orchard, pagoda, palace, parking lot, path, pavilion, pier, pond, post office, power plant,
    prison, pub, pyramids, quarry, railway, rainforest, ranch, reef, road, roller coaster, roof, ruins, savanna,
    school, sea, shipyard, shop, shore, shrine, sidewalk, ski slope, stage, staircase, stairs, store, street,
    suburb, supermarket, synagogue, temple, terrace, theater, tower, town, track, trail, tunnel, underwater,
    university, valley, wall, warehouse, wasteland, wetland, woods, workshop, zoo"""
)
_SKY_AND_WEATHER = listed(
    """sun, moon, crescent moon, full moon, half moon, new moon face, planet, ringed planet, earth, comet, shooting
    star, milky way, galaxy, stars, sunshine, sun behind a cloud, cloud, clouds, cloud with rain, cloud with snow,
    cloud with lightning, rain, raindrops, puddle, rainbow, snow, snowflake, hail, ice, icicle, frost, fog, mist,
    wind, storm, tornado, hurricane, lightning, thunder, flood, wave, waves, fire, flame, smoke, steam, dust, sand,
    mud, rock, stone, crystal, water, water drop, bubbles, sunset, sunrise, dusk, dawn, night, midnight, afternoon,
    eclipse, aurora, heat, drought, avalanche, earthquake, explosion"""
)
_DOINGS = listed(
    """arguing, baking, bathing, building, camping, celebrating, chasing, cheering, cleaning, climbing, crawling,
    cutting, cycling, diving, drawing, driving, falling, farming, fighting, fishing, floating, flying, gardening,
    giving a speech, gossiping, grilling, hiking, holding hands, hunting, ice skating, juggling, kicking, kneeling,
    knitting, lifting weights, listening to music, marching, meditating, mining, paddling, painting, parachuting,
    pointing, praying, pushing, racing, rowing, sailing, screaming, sewing, shopping, shouting, singing, skiing,
    smoking, snowboarding, sneezing, standing in line, studying, surfing, sweeping, talking, teaching, thinking,
    throwing, travelling, typing, waving, wrestling, yawning, yoga, birthday, wedding, concert, parade, party,
    meeting, graduation, funeral, holiday, halloween, christmas, easter, new year, sport, music, dance, science,
    medicine, religion, war, peace, love, business, education, fashion, history, nature, technology, travel,
    transport, weather, work, health, crime, magic, luck"""
)
_LOOKS = listed(
    """beautiful, ugly, cute, scary, funny, strange, calm, busy, empty, full, crowded, lonely, dark, bright, light,
    pale, colorful, transparent, blurry, sharp, flat, smooth, rough, soft, hard, fluffy, spiky, curved, straight,
    twisted, square, long, short, tall, wide, narrow, thick, tiny, huge, heavy, open, closed, hot, cold, frozen,
    melting, burning, dry, wet, dirty, clean, fresh, rotten, expensive, modern, ancient, antique, rusty, golden,
    silver, metallic, wooden, stone, glass, plastic, paper, leather, woollen, silk, cotton, furry, feathered,
    marble, brick, concrete, neon, glowing, shining, sparkling, shadowy, symmetric, repeated, single, pair, group,
    row, pile, circle of things, upside down, seen from above, seen from below, seen from behind, seen from the
    side, close up, far away, in the air, under water, in space, indoors, outdoors, white background, black
    background, gradient background, plain background, magenta, cyan, violet, navy blue, sky blue, light blue, dark
    blue, dark green, light green, olive, lime green, dark red, crimson, maroon, peach color, cream color, brown
    and white, black and white, red and white, blue and white, red and yellow, green and yellow, multicolored,
    rainbow colored, sepia, no color, skin color, light brown, dark brown, light gray, dark gray"""
)
_IMAGES = listed(
    """photograph, picture, painting, illustration, snapshot, selfie, screenshot, scan, x-ray picture, map, plan,
    blueprint, chart, document, handwriting, printed text, book cover, magazine cover, album cover, advertisement,
    wallpaper, collage, comic, manga, anime, caricature, doodle, line art, silhouette picture, stencil,
    calligraphy, mural, fresco, icon painting, still life, landscape, seascape, cityscape, night scene, macro
    photo, panorama, portrait photo, product photo, food photo, stock photo, wildlife photo, sports photo, fashion
    photo, aerial view, satellite picture, film still, video game screenshot, 3d model, clay render, flat icon,
    glossy icon, outline icon, sticker set, pixel art, isometric drawing, technical drawing, children's drawing,
    chalk drawing, crayon drawing, sand art, ice sculpture, bronze statue, marble statue, wood carving, glass
    figure, plush toy, plastic toy, lego model, knitted figure, balloon animal"""
)
_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@cache
def everyday_words() -> tuple[str, ...]:
    """The built-in list, each entry once: things, people, places, doings, looks, kinds of pictures, colored things.

    >>> everyday_words()[:3], "purple bicycle" in everyday_words()
    (('cat', 'dog', 'kitten'), True)
    """
    alone = (
        *(everyday.ANIMAL, _ANIMALS, everyday.PERSON, _PEOPLE, _BODIES_AND_GESTURES, _PLANTS),
        *(everyday.FOOD, _FOODS, everyday.THING, _THINGS, _SIGNS, everyday.VEHICLE, _VEHICLES),
        *(everyday.PLACE, _PLACES, _SKY_AND_WEATHER, everyday.COLOR, everyday.KIND, everyday.TEMPER, _LOOKS),
        *(everyday.MOTION, everyday.WORK, _DOINGS, everyday.WHERE, everyday.WHEN),
        *(everyday.MEDIUM, _IMAGES, everyday.MANNER, everyday.LOOK),
    )
    colored = (f"{color} {thing}" for color in _COLORS for thing in (*everyday.THING, *everyday.VEHICLE))
    return tuple(dict.fromkeys([*(word for words in alone for word in words), *colored]))


def read_words(path: Path) -> tuple[str, ...]:
    """A list in a text file, one word or phrase a line; lines that are there already are left out.

    Raises:
        InputError: it cannot be read, is empty, or has more than 100,000 lines.
    """
    words = read_lines(path, "words")
    if not 0 < len(words) <= _MOST:
        raise InputError(
            f"{printable(path)}: found {len(words)} words, expected 1 to {_MOST}, one a line: name another file"
        )
    return words
