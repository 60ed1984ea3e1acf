"""The table of synthetic "diagnoses": how each kind of lesion is drawn, and the phrases that say so.

Not medical data; `synthetic.py` draws and writes from it.
"""

from __future__ import annotations

from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Kind:
    """A synthetic "diagnosis": how it is drawn, and the phrases that say so. Lengths are in half image widths."""

    path: tuple[str, ...]  # from general to specific; the last one is the diagnosis
    layout: str  # single, ring, scatter, cluster or band
    radius: float
    stretch: float  # long over short axis, at most
    wobble: float  # irregularity of the outline
    softness: float  # width of the border, relative to the radius
    surface: str  # a case of `_add_surface`
    colours: dict[str, tuple[RGB, RGB]]  # what the caption calls it: main and second colour
    relief: float  # how far it stands out
    primary: str  # the noun, singular
    shapes: tuple[str, ...]
    borders: tuple[str, ...]
    surfaces: tuple[str, ...]
    concepts: tuple[str, ...]
    sites: tuple[str, ...]
    ages: tuple[int, int]
    symptoms: tuple[str, ...]
    causes: tuple[str, ...]
    tests: tuple[str, ...]
    treatments: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path[-1]


_INFLAMED, _TUMOUR = ("inflammatory", "non-infectious"), ("proliferations", "melanocytic")
# fmt: off
KINDS: tuple[Kind, ...] = (
    Kind(
        path=(*_INFLAMED, "psoriasis"), layout="single", radius=0.5, stretch=1.5, wobble=0.08, softness=0.12,
        surface="scale",
        colours={"salmon-pink": ((205, 105, 95), (225, 140, 125)), "deep red": ((175, 65, 60), (205, 105, 95))},
        relief=0.5, primary="plaque", shapes=("oval", "round to oval"), borders=("sharply demarcated", "well-defined"),
        surfaces=("covered by thick silvery scale", "with white flaking scale"),
        concepts=("plaque", "scale", "erythema"), sites=("scalp", "forearm", "trunk", "lower leg"), ages=(15, 80),
        symptoms=("itches mildly", "bleeds in points when scales are lifted"),
        causes=("after a streptococcal throat infection", "during a stressful winter"),
        tests=("Nail pitting supports this.",),
        treatments=("a potent topical steroid with calcipotriol", "narrow-band UVB phototherapy"),
    ),
    Kind(
        path=(*_INFLAMED, "eczema", "nummular eczema"), layout="single", radius=0.45, stretch=1.2, wobble=0.1,
        softness=0.5, surface="crust",
        colours={"dull red": ((185, 90, 80), (205, 120, 100)), "pink": ((215, 130, 120), (200, 100, 90))}, relief=0.3,
        primary="plaque", shapes=("coin-shaped", "round"), borders=("poorly defined", "ill-defined"),
        surfaces=("with oozing and fine yellow crusts", "dotted with crusts"),
        concepts=("plaque", "erythema", "crust", "excoriation"), sites=("lower leg", "forearm", "trunk"), ages=(20, 85),
        symptoms=("itches intensely at night", "burns after washing"),
        causes=("after frequent hot showers", "in the dry winter months"), tests=("Patch tests were negative.",),
        treatments=("emollients and a moderately potent steroid", "tacrolimus ointment"),
    ),
    Kind(
        path=("inflammatory", "infectious", "fungal", "tinea corporis"), layout="ring", radius=0.55, stretch=1.25,
        wobble=0.07, softness=0.5, surface="scale",
        colours={"red": ((190, 80, 70), (210, 110, 95)), "reddish-brown": ((160, 80, 60), (185, 105, 85))}, relief=0.4,
        primary="ring", shapes=("annular", "ring-shaped"), borders=("sharp, raised", "advancing, well-defined"),
        surfaces=("with scale along the edge and a clear centre", "scaling at the rim while the middle heals"),
        concepts=("erythema", "scale", "plaque"), sites=("trunk", "forearm", "lower leg", "groin"), ages=(5, 70),
        symptoms=("itches and slowly widens", "is itchy when sweating"),
        causes=("after contact with a kitten", "after wrestling training"),
        tests=("A potassium hydroxide preparation shows hyphae.",),
        treatments=("terbinafine cream for four weeks", "topical clotrimazole"),
    ),
    Kind(
        path=(*_INFLAMED, "granuloma annulare"), layout="ring", radius=0.45, stretch=1.15, wobble=0.04, softness=0.6,
        surface="smooth",
        colours={"skin-coloured": ((205, 145, 120), (215, 160, 135)),
                 "pale violet": ((180, 125, 130), (200, 145, 140))},
        relief=1.1, primary="ring", shapes=("annular", "arciform"), borders=("firm, beaded", "raised, cord-like"),
        surfaces=("with a smooth surface", "without any scale"), concepts=("papule", "dome-shaped"),
        sites=("forearm", "palm", "lower leg"), ages=(5, 60),
        symptoms=("causes no discomfort", "is neither itchy nor painful"),
        causes=("without a known trigger", "after an insect bite"), tests=("Histology shows palisading granulomas.",),
        treatments=("watchful waiting", "intralesional triamcinolone"),
    ),
    Kind(
        path=(*_TUMOUR, "melanoma"), layout="single", radius=0.42, stretch=1.7, wobble=0.3, softness=0.18,
        surface="mottle",
        colours={"brown-black": ((70, 42, 35), (30, 22, 25)), "blue-black and brown": ((85, 50, 38), (48, 48, 68))},
        relief=0.25, primary="macule", shapes=("irregular", "asymmetrical"), borders=("notched", "jagged, notched"),
        surfaces=("with several shades mixed together", "of uneven pigmentation"),
        concepts=("pigmented", "black", "macule"), sites=("trunk", "lower leg", "face", "forearm"), ages=(30, 88),
        symptoms=("has changed in colour", "bleeds now and then"),
        causes=("after years of sunburns", "within an older mole"), tests=("Dermoscopy shows an atypical network.",),
        treatments=("wide local excision", "excision and sentinel node biopsy"),
    ),
    Kind(
        path=(*_TUMOUR, "melanocytic nevus"), layout="single", radius=0.27, stretch=1.25, wobble=0.05, softness=0.22,
        surface="smooth",
        colours={"evenly brown": ((115, 72, 50), (125, 80, 55)), "light brown": ((155, 105, 75), (150, 98, 68))},
        relief=0.5, primary="papule", shapes=("round", "symmetrical"), borders=("regular", "smooth, even"),
        surfaces=("with a smooth surface", "of uniform pigmentation"),
        concepts=("pigmented", "papule", "brown(hyperpigmentation)"), sites=("trunk", "face", "forearm", "scalp"),
        ages=(6, 60), symptoms=("has never changed", "causes no complaints"),
        causes=("after a summer holiday", "during a growth spurt"), tests=("Dermoscopy shows a regular network.",),
        treatments=("reassurance and yearly photographs", "no treatment"),
    ),
    Kind(
        path=("proliferations", "non-melanocytic", "seborrheic keratosis"), layout="single", radius=0.4, stretch=1.45,
        wobble=0.1, softness=0.1, surface="dots",
        colours={"tan": ((160, 115, 75), (135, 90, 58)), "dark brown": ((100, 66, 45), (80, 52, 36))}, relief=0.9,
        primary="plaque", shapes=("oval", "egg-shaped"), borders=("stuck-on, sharp", "abrupt"),
        surfaces=("dotted with horn cysts", "warty and studded with dark plugs"),
        concepts=("warty/papillomatous", "plaque", "pigmented"), sites=("trunk", "face", "scalp"), ages=(45, 92),
        symptoms=("catches on clothing", "itches occasionally"),
        causes=("after retirement", "beside many similar ones"), tests=("Milia-like cysts are seen on dermoscopy.",),
        treatments=("cryotherapy", "curettage for cosmetic reasons"),
    ),
    Kind(
        path=("proliferations", "non-melanocytic", "basal cell carcinoma"), layout="single", radius=0.36, stretch=1.3,
        wobble=0.1, softness=0.2, surface="pearl",
        colours={"pearly pink": ((222, 160, 148), (205, 125, 115)), "translucent": ((228, 180, 165), (210, 145, 135))},
        relief=1.2, primary="nodule", shapes=("round", "dome-shaped"), borders=("rolled", "raised, pearly"),
        surfaces=("with fine branching vessels", "crossed by telangiectases, crusted in the middle"),
        concepts=("nodule", "telangiectasia", "translucent", "ulcer"), sites=("face", "scalp", "trunk"), ages=(45, 92),
        symptoms=("bleeds on shaving", "does not heal"),
        causes=("on sun-damaged skin", "after decades of outdoor work"),
        tests=("Arborising vessels are seen on dermoscopy.",),
        treatments=("Mohs surgery", "complete excision", "topical imiquimod"),
    ),
    Kind(
        path=(*_INFLAMED, "lichen planus"), layout="cluster", radius=0.15, stretch=1.0, wobble=0.0, softness=0.25,
        surface="lace",
        colours={"violaceous": ((140, 85, 130), (160, 105, 145)), "purple": ((115, 65, 110), (140, 85, 130))},
        relief=0.6, primary="papule", shapes=("grouped", "clustered"), borders=("polygonal, sharp", "angular"),
        surfaces=("flat-topped with fine white streaks", "shiny with a white lace-like network"),
        concepts=("papule", "purple", "flat topped"), sites=("forearm", "lower leg", "trunk"), ages=(25, 75),
        symptoms=("itches severely", "itches and is scratched"),
        causes=("after a new blood-pressure drug", "without a known trigger"),
        tests=("A band-like infiltrate is found on biopsy.",),
        treatments=("clobetasol ointment", "oral prednisolone for three weeks"),
    ),
    Kind(
        path=("inflammatory", "infectious", "viral", "herpes zoster"), layout="band", radius=0.11, stretch=1.0,
        wobble=0.0, softness=0.3, surface="vesicle",
        colours={"red": ((195, 75, 70), (215, 105, 95)), "dusky red": ((160, 70, 75), (190, 95, 95))}, relief=0.8,
        primary="vesicle", shapes=("linear", "band-like"), borders=("tense, sharp", "crowded, well-defined"),
        surfaces=("filled with clear yellow fluid", "on an inflamed base"), concepts=("vesicle", "erythema", "crust"),
        sites=("trunk", "face", "groin"), ages=(30, 90),
        symptoms=("burns and stabs along one nerve", "is very painful"),
        causes=("after a chest infection", "under chemotherapy"), tests=("PCR of the fluid is positive.",),
        treatments=("oral valaciclovir", "aciclovir and gabapentin"),
    ),
    Kind(
        path=("inflammatory", "infectious", "viral", "molluscum contagiosum"), layout="scatter", radius=0.12,
        stretch=1.0, wobble=0.0, softness=0.18, surface="dimple",
        colours={"flesh-coloured": ((220, 165, 145), (230, 185, 165)),
                 "pearly white": ((232, 205, 190), (238, 215, 205))},
        relief=1.3, primary="papule", shapes=("scattered", "disseminated"),
        borders=("dome-shaped, sharp", "firm, hemispherical"),
        surfaces=("with a central dimple", "each umbilicated in the middle"),
        concepts=("papule", "umbilicated", "dome-shaped"), sites=("trunk", "face", "groin"), ages=(2, 14),
        symptoms=("spreads by scratching", "causes little itch"),
        causes=("after swimming lessons", "in a child with atopic skin"), tests=("No test was needed.",),
        treatments=("curettage under local anaesthetic", "waiting for spontaneous clearing"),
    ),
    Kind(
        path=("reaction patterns and descriptive terms", "vitiligo"), layout="single", radius=0.52, stretch=1.5,
        wobble=0.22, softness=0.1, surface="smooth",
        colours={"milk-white": ((246, 234, 226), (250, 240, 234)), "chalk-white": ((240, 226, 216), (246, 234, 226))},
        relief=0.0, primary="patch", shapes=("map-like", "irregular"), borders=("convex, sharp", "clear-cut"),
        surfaces=("completely depigmented and smooth", "without scale or atrophy"),
        concepts=("patch", "white(hypopigmentation)"), sites=("face", "palm", "trunk", "groin"), ages=(8, 65),
        symptoms=("causes no complaints", "burns easily in the sun"),
        causes=("after emotional stress", "with a family history of thyroid disease"),
        tests=("It glows under Wood's lamp.",), treatments=("tacrolimus and sun protection", "excimer light"),
    ),
    Kind(
        path=("inflammatory", "infectious", "bacterial", "impetigo"), layout="cluster", radius=0.2, stretch=1.0,
        wobble=0.0, softness=0.4, surface="honey",
        colours={"red and honey-yellow": ((200, 90, 75), (215, 165, 70)),
                 "golden-crusted": ((205, 110, 85), (225, 180, 85))},
        relief=0.4, primary="erosion", shapes=("confluent", "grouped"), borders=("blurred", "spreading, indistinct"),
        surfaces=("topped by honey-coloured crust", "weeping and stuck with golden crusts"),
        concepts=("erosion", "crust", "yellow", "erythema"), sites=("face", "trunk", "forearm"), ages=(2, 40),
        symptoms=("is sticky and sore", "itches slightly"),
        causes=("in a nursery outbreak", "over scratched insect bites"), tests=("A swab grew Staphylococcus aureus.",),
        treatments=("fusidic acid cream", "oral flucloxacillin"),
    ),
    Kind(
        path=("reaction patterns and descriptive terms", "hypersensitivity", "urticaria"), layout="scatter",
        radius=0.27, stretch=1.0, wobble=0.0, softness=0.9, surface="wheal",
        colours={"pale pink": ((222, 140, 128), (235, 185, 172)), "rose": ((210, 115, 110), (228, 165, 155))},
        relief=0.7, primary="wheal", shapes=("scattered", "widespread"), borders=("blurred", "soft, fading"),
        surfaces=("oedematous with a pale middle", "swollen and smooth"), concepts=("wheal", "erythema"),
        sites=("trunk", "forearm", "lower leg", "groin"), ages=(10, 70),
        symptoms=("itches and moves within hours", "stings and comes and goes"),
        causes=("after taking ibuprofen", "after a meal of shellfish"), tests=("Blood tests were normal.",),
        treatments=("a second-generation antihistamine", "cetirizine in raised dose"),
    ),
)
# fmt: on
