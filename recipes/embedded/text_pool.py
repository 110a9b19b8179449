"""Writes the shipped general text pool: short descriptions of what an image can show, composed from word lists.

    PYTHONPATH=recipes python -m embedded.text_pool --out mmhooks/assets/texts/general.txt

Every line is a noun phrase or a short sentence about one property; a line ``# kind`` stands above each kind.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from mmhooks.utils.files import write_text

app = typer.Typer(add_completion=False)


def words(text: str) -> list[str]:
    return [w.strip() for w in text.replace("\n", " ").split(",") if w.strip()]


def each(templates: list[str], names: list[str]) -> list[str]:
    return [t.format(n) for t, n in product(templates, names)]


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


COLOURS = words(
    "red, orange, yellow, green, blue, purple, pink, brown, black, white, grey, beige, turquoise, navy blue, "
    "light green, dark red, golden, silver, magenta, olive"
)
SHAPES = words(
    "circle, square, triangle, star, heart, arrow, cross, ring, crescent, diamond, hexagon, spiral, cube, cone, "
    "cylinder, ball, rectangle, oval, wave, zigzag, grid, straight line, curved line, pyramid"
)
NUMBERS = words("one, two, three, four, five, six, seven, eight, nine, ten")
COUNTED = words("things, people, animals, dots, flowers, faces, buildings, vehicles")
INDOORS = words(
    "kitchen, bedroom, bathroom, classroom, office, library, hospital, theatre, church, shop, restaurant, factory, "
    "cellar, attic, gym, laboratory, garage, museum"
)
OUTDOORS = words(
    "beach, forest, desert, mountain, lake, river, field, garden, street, city at night, harbour, farm, island, jungle, "
    "waterfall, park, bridge, railway station, airport, snowy hill, swamp, cave, meadow, volcano, coast, canyon, "
    "playground, stadium, market, car park"
)
REGIONS = words(
    "Africa, the Arctic, Australia, Brazil, Canada, China, Egypt, England, France, Germany, Greece, India, Italy, Japan, "
    "Korea, Mexico, Nepal, the Netherlands, New York, Norway, Peru, Russia, Spain, Thailand, Turkey, Venice"
)
TEXTURES = words(
    "striped, dotted, checked, furry, feathered, wooden, metallic, stony, glassy, woollen, leathery, wet, rusty, "
    "cracked, smooth, rough, shiny, transparent, woven, wrinkled, scaly, frozen, dusty, bubbly, marbled"
)
MATERIALS = words(
    "wood, steel, glass, paper, plastic, cloth, stone, brick, clay, gold, ice, sand, rubber, leather, wool"
)
MOODS = words(
    "happy, sad, angry, calm, frightening, funny, lonely, romantic, mysterious, cheerful, tired, surprised, proud, "
    "disgusted, bored, playful, solemn, peaceful, chaotic, elegant, festive, gloomy"
)
ANIMALS = words(
    "dog, cat, horse, cow, pig, sheep, goat, rabbit, mouse, rat, hamster, squirrel, fox, wolf, bear, panda, koala, lion, "
    "tiger, leopard, elephant, rhinoceros, hippopotamus, giraffe, zebra, camel, deer, kangaroo, monkey, gorilla, bat, "
    "hedgehog, otter, beaver, seal, whale, dolphin, shark, fish, octopus, crab, lobster, snail, butterfly, bee, ant, "
    "beetle, spider, scorpion, snake, lizard, crocodile, turtle, frog, eagle, owl, parrot, penguin, duck, swan, "
    "chicken, rooster, peacock, flamingo, dinosaur, dragon, unicorn"
)
PLANTS = words(
    "tree, palm tree, pine tree, cactus, rose, tulip, sunflower, leaf, mushroom, blade of grass, bamboo plant, fern, clover, "
    "cherry blossom, ivy, seedling"
)
FRUITS = words(
    "apple, banana, lemon, cherry, strawberry, watermelon, pineapple, tomato, carrot, potato, egg, pizza, hamburger, "
    "sandwich, cake, biscuit, pancake, sausage, bunch of grapes, loaf of bread"
)
FOODS = words(
    "corn, bread, cheese, noodles, rice, soup, salad, ice cream, chocolate, coffee, tea, beer, wine, milk, sushi"
)
TOOLS = words(
    "hammer, screwdriver, saw, axe, pair of scissors, knife, needle, ladder, bucket, brush, rope, chain, key, lock, magnet, "
    "telescope, microscope, compass, ruler, pencil, pen"
)
THINGS = words(
    "chair, table, bed, lamp, candle, clock, mirror, window, door, book, newspaper, envelope, box, bag, bottle, cup, "
    "plate, fork, spoon, umbrella, hat, crown, shoe, boot, glove, shirt, dress, pair of glasses, ring, necklace, watch, "
    "telephone, computer, keyboard, camera, television, radio, battery, light bulb, coin, banknote, flag, balloon, gift, "
    "ball, kite, doll, puzzle, dice, playing card, guitar, violin, piano, drum, trumpet, bell, microphone"
)
VEHICLES = words(
    "car, bus, truck, tractor, bicycle, motorcycle, train, tram, ship, sailing boat, canoe, aeroplane, helicopter, rocket, "
    "hot-air balloon, ambulance, fire engine, taxi"
)
BUILDINGS = words(
    "house, castle, tower, skyscraper, church, mosque, temple, windmill, lighthouse, tent, hut, barn, hotel, school, factory"
)
PEOPLE = words(
    "baby, child, girl, boy, woman, man, old woman, old man, couple, family, crowd, police officer, doctor, nurse, cook, "
    "farmer, teacher, soldier, firefighter, scientist, artist, singer, dancer, athlete, king, queen, wizard, astronaut, "
    "pilot, builder, judge, bride, detective"
)
GROUPS = ("couple", "family", "crowd")
BODY = words(
    "face, eye, ear, nose, mouth, tooth, tongue, hand, finger, foot, leg, arm, head of hair, beard, heart, brain, bone"
)
ACTIONS = words(
    "running, walking, jumping, swimming, sleeping, eating, drinking, reading, writing, singing, dancing, fighting, "
    "working, cooking, climbing, cycling, flying, falling, laughing, crying, waving, pointing, hugging, playing a game, "
    "throwing a ball, riding a horse, sitting down, standing still"
)
GESTURES = words(
    "thumb up, thumb down, raised fist, open palm, clapping hands, crossed fingers, folded hands, handshake"
)
WEATHER = words(
    "sunshine, rain, snow, fog, a storm, lightning, wind, a rainbow, clouds, a sunset, a sunrise, moonlight, stars, "
    "frost, a tornado, a clear sky"
)
SEASONS = words(
    "spring, summer, autumn, winter, morning, midday, evening, night, Christmas, a birthday, a wedding"
)
STYLES = words(
    "photograph, black and white photograph, oil painting, watercolour, pencil drawing, ink drawing, cartoon, comic, icon, "
    "logo, poster, map, diagram, chart, mosaic, sculpture, engraving, silhouette, sketch, pixel picture, stencil, "
    "collage, embroidery, stained glass window, computer rendering, children's drawing, coat of arms, screenshot, "
    "woodcut, fresco"
)
VIEWS = words(
    "seen from above, seen from below, seen from the side, seen from behind, seen from the front, very close, far away, "
    "cut off at the edge, in the middle, at the left edge, at the right edge, at the top, at the bottom, upside down, "
    "mirrored, blurred in motion, out of focus, behind a fence, partly hidden"
)
LIGHT = words(
    "bright light, dim light, strong shadows, a glow, a reflection, backlight, a white background, a black background, "
    "a blue background, a plain background, a busy background, high contrast, low contrast, pale colours, "
    "saturated colours, many colours, a single colour, warm colours, cold colours"
)
SIGNS = words(
    "letter, word, number, question mark, exclamation mark, traffic sign, warning sign, flag, arrow pointing left, "
    "arrow pointing right, arrow pointing up, arrow pointing down, tick, cross mark, musical note, currency symbol, "
    "astrological sign, religious symbol, play button, no-entry sign, recycling symbol, clock face, speech bubble"
)
SIZES = words(
    "tiny, small, large, huge, long, short, wide, narrow, tall, flat, thick, thin, round, pointed, hollow, bent"
)


def kinds() -> dict[str, list[str]]:
    """Kind -> its descriptions, in order; none occurs twice."""
    made = {
        "colour": [
            *each(["{} things", "a picture that is mostly {}"], COLOURS),
            *(f"{a(c)} object on a plain background" for c in COLOURS),
            *(
                f"{a(c)} {thing}"
                for c in COLOURS[:12]
                for thing in ("flower", "car", "bird", "circle", "shirt")
            ),
            *(f"{one} and {two}" for i, one in enumerate(COLOURS[:10]) for two in COLOURS[i + 1 : 10]),
        ],
        "shape": [
            *(a(s) for s in SHAPES),
            *each(["something shaped like a {}", "many of the shape {}"], SHAPES),
            *(f"something {s}" for s in SIZES),
        ],
        "count": [
            *(
                f"{n} {c if n != 'one' else {'people': 'person'}.get(c, c[:-1])}"
                for n in NUMBERS
                for c in COUNTED
            ),
            *each(
                ["a pair of {}", "a row of {}", "a pile of {}", "a great many {}", "no {} at all"], COUNTED
            ),
        ],
        "place": [
            *(f"inside {a(p)}" for p in INDOORS),
            *(f"a picture taken at {a(p)}" for p in OUTDOORS),
            *(f"{a(p)} in the background" for p in OUTDOORS),
            *each(["somewhere in {}", "a view of {}"], REGIONS),
            *(f"under the {p}" for p in ("sea", "sky", "ground", "trees")),
        ],
        "texture": [
            *each(["a {} surface", "something {}"], TEXTURES),
            *each(["an object made of {}", "a wall of {}"], MATERIALS),
        ],
        "mood": [*(f"{a(m)} scene" for m in MOODS), *(f"{a(m)} face" for m in MOODS)],
        "animal": [*(a(x) for x in ANIMALS), *(f"the head of {a(x)}" for x in ANIMALS)],
        "plant": [a(x) for x in PLANTS],
        "food": [
            *(a(x) for x in FRUITS),
            *(f"{a(x)} on a plate" for x in FRUITS),
            *FOODS,
            *(f"{x} on a table" for x in FOODS),
        ],
        "tool": [*(a(x) for x in TOOLS), *(f"a hand holding {a(x)}" for x in TOOLS)],
        "thing": [a(x) for x in THINGS],
        "vehicle": [*(a(x) for x in VEHICLES), *(f"{a(x)} on its way" for x in VEHICLES)],
        "building": [a(x) for x in BUILDINGS],
        "person": [*(a(x) for x in PEOPLE), *(f"the face of {a(x)}" for x in PEOPLE if x not in GROUPS)],
        "body": [a(x) for x in BODY],
        "action": [*(f"someone {x}" for x in ACTIONS), *(f"an animal {x}" for x in ACTIONS[:10])],
        "gesture": list(GESTURES),
        "weather": [*WEATHER, *(f"{x} over the sea" for x in WEATHER)],
        "time": [f"a picture that speaks of {x}" for x in SEASONS],
        "style": [*(a(s) for s in STYLES), *(f"{a(s)} of a person" for s in STYLES)],
        "view": [*(f"something {v}" for v in VIEWS), *(f"an animal {v}" for v in VIEWS)],
        "light": [f"a picture with {x}" for x in LIGHT],
        "sign": [a(s) for s in SIGNS],
    }
    seen: set[str] = set()
    for kind, lines in made.items():
        made[kind] = [x for x in dict.fromkeys(lines) if x not in seen]
        seen.update(made[kind])
    return made


def compose() -> str:
    return "\n".join("\n".join([f"# {kind}", *lines]) for kind, lines in kinds().items()) + "\n"


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("mmhooks/assets/texts/general.txt"),
) -> None:
    """Composes the pool and writes it.

    Example: PYTHONPATH=recipes python -m embedded.text_pool --out general.txt
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, compose())
    typer.echo(f"{out}: {sum(map(len, kinds().values()))} texts of {len(kinds())} kinds")


if __name__ == "__main__":
    app()
