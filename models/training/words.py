"""The word lists that the corpus grammar draws from."""

GIRLS = """Mia Lily Anna Ruby Clara Nora Daisy Ella Rosa Luna Ivy Hazel Willow Poppy Maya Zoe Tilly
Pearl Olive Fern Bella Molly Penny Wren Emma Sara Nina Lucy Alice Kate""".split()
BOYS = """Tom Max Ben Leo Sam Finn Jack Oscar Milo Toby Felix Hugo Otto Theo Jasper Rusty Bruno Pip
Gus Barnaby Oliver Henry Archie Teddy Noah Adam Peter Omar Ravi Luis""".split()

ANIMALS = """fox rabbit bear owl mouse cat dog frog duck hen pig cow goat sheep horse pony lion
tiger elephant monkey turtle snail squirrel hedgehog badger beaver otter deer wolf crow robin
penguin seal whale dolphin crab bee ant ladybug butterfly dragon unicorn kitten puppy koala panda
kangaroo giraffe zebra camel parrot swan goose bat mole raccoon lizard dinosaur robot spider
chicken bird fish donkey octopus""".split()
WOMEN = "girl princess queen witch grandmother".split()
MEN = "boy prince king wizard grandfather".split()
PEOPLE = "knight pirate farmer baker sailor giant astronaut teacher painter doctor".split()

ADJECTIVES = """little small young brave shy kind clever curious cheerful gentle sleepy quiet
playful friendly happy lonely tiny proud""".split()
COLORS = "red blue green yellow purple orange white black pink silver golden brown gray".split()
THINGS = """kite ball key lantern drum hat scarf bell book basket button coin cup map ring umbrella
whistle flute spoon blanket mitten shell feather stone box bottle clock crown doll teapot wagon
bucket marble ribbon necklace compass telescope paintbrush boat ladder lamp""".split()
FOODS = """apples berries honey bread cheese soup carrots nuts plums pears cake pie cookies pancakes
cherries corn porridge jam muffins grapes oranges bananas rice noodles""".split()
CROPS = "apples berries carrots nuts plums pears cherries grapes beans pumpkins".split()
WARM_FOODS = ["soup", "porridge", "tea", "bread", "milk", "pie", "cocoa"]

# A place and how one is at it.
PLACES = {
    "forest": "in",
    "meadow": "in",
    "valley": "in",
    "village": "in",
    "river": "by",
    "lake": "by",
    "sea": "by",
    "mountain": "on",
    "hill": "on",
    "garden": "in",
    "castle": "in",
    "town": "in",
    "jungle": "in",
    "island": "on",
    "pond": "by",
    "desert": "in",
    "cave": "in",
    "orchard": "in",
    "swamp": "in",
    "city": "in",
    "farm": "on",
    "field": "in",
    "beach": "on",
    "park": "in",
}
PLACE_ADJECTIVES = "quiet green big little beautiful sunny far-away windy old warm".split()
SPOTS = [
    "under a bush",
    "behind a big rock",
    "inside a hollow log",
    "next to the old well",
    "at the top of a tall tree",
    "in the long grass",
    "under the bridge",
    "beside the gate",
    "in a pile of leaves",
    "behind the mill",
    "under a wooden bench",
    "between two stones",
    "near the fence",
    "at the bottom of a hole",
    "behind the red barn",
]
WEATHER = ["sunny", "cold", "rainy", "windy", "warm", "bright", "foggy", "snowy"]
TIMES = ["morning", "afternoon", "day", "evening"]

CITIES = """Oakville Riverton Paris London Rome Berlin Madrid Tokyo Oslo Lima Cairo Dublin Vienna
Boston Sydney Delhi Milan Lisbon Athens Chicago""".split()
CAPITALS = {
    "France": "Paris",
    "England": "London",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Egypt": "Cairo",
    "Ireland": "Dublin",
    "Austria": "Vienna",
    "India": "New Delhi",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "China": "Beijing",
    "Russia": "Moscow",
    "Canada": "Ottawa",
    "Poland": "Warsaw",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "up": "down",
    "day": "night",
    "happy": "sad",
    "fast": "slow",
    "old": "young",
    "wet": "dry",
    "light": "dark",
    "open": "closed",
    "full": "empty",
    "high": "low",
    "loud": "quiet",
    "early": "late",
    "left": "right",
    "hard": "soft",
    "in": "out",
    "good": "bad",
    "clean": "dirty",
    "rich": "poor",
    "strong": "weak",
}
SOUNDS = {
    "cow": "moo",
    "dog": "woof",
    "cat": "meow",
    "duck": "quack",
    "sheep": "baa",
    "pig": "oink",
    "horse": "neigh",
    "lion": "roar",
    "frog": "ribbit",
    "owl": "hoot",
    "bee": "buzz",
    "mouse": "squeak",
    "snake": "hiss",
    "wolf": "howl",
    "crow": "caw",
}
FACT_COLORS = {
    "grass": "green",
    "the sky": "blue",
    "snow": "white",
    "a banana": "yellow",
    "a carrot": "orange",
    "a strawberry": "red",
    "coal": "black",
    "the sun": "yellow",
    "a lemon": "yellow",
    "a flamingo": "pink",
    "milk": "white",
    "chocolate": "brown",
    "a frog": "green",
}
GROUPS = {
    "animals": ANIMALS[:30],
    "colors": COLORS[:10],
    "fruits": [
        "an apple",
        "a pear",
        "a plum",
        "a banana",
        "an orange",
        "a cherry",
        "a lemon",
        "a peach",
        "a mango",
    ],
    "foods": FOODS,
    "names": GIRLS + BOYS,
    "cities": CITIES,
    "countries": list(CAPITALS),
}
