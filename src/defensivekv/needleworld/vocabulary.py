"""The words of the needle world. One word is one token; the order of `VOCABULARY` is the tokenizer's."""

PAD, BOS, END, UNKNOWN = "<pad>", "<bos>", "<end>", "<unk>"

STRUCTURE = tuple(
    """special number question answer first second third one two three four store copy chain recall .""".split()
)
ORDINALS = ("first", "second", "third")
INDICES = ("one", "two", "three", "four")

ADJECTIVES = tuple(
    """amber ancient azure bitter bold brave bright brisk broken calm clever cold copper coral crisp crimson
    curious dusty eager early emerald faint fierce frozen gentle gilded golden hidden hollow humble icy ivory
    jolly lonely lucky marble mellow misty narrow noble pale proud quiet rapid rusty scarlet silent velvet""".split()
)
NOUNS = tuple(
    """anchor archive badger basin beacon bridge canyon castle cedar citadel cliff comet compass cottage
    crater dolphin ember falcon ferry fjord forest fountain garden glacier harbor heron island jungle kettle
    lagoon lantern lighthouse meadow mirror monastery orchard otter parrot piano prairie quarry raven river
    saddle temple tunnel valley willow""".split()
)
NUMBERS = tuple(f"{number:02d}" for number in range(100))
VARIABLES = tuple(
    """alef bario cendo dalka emrit fosko gavin harlo indre jasko kelva lumen miron nadir ordan pelka quint
    rovan selka tarim ulmer vasko wendo xalan yorim zelda abrix bruno corto delmo ektor fajar grino helio
    ivano jovan kordo lenka marlo nikta olvar petro ravel simko tomas umbra viktor zaren""".split()
)

DETERMINERS = ("the", "a", "every", "another", "this", "that")
FILLER_NOUNS = tuple(
    """actor aunt author baker banker barber boat book boy brother builder bus butcher cab captain car
    carpenter cat child clerk coach cook cousin cow crowd dancer daughter dentist doctor dog donkey driver
    duck editor engineer farmer father fisher friend girl goat grocer guard guest guide hen horse hunter
    husband judge king knight lady lawyer leader letter librarian lion maid manager man mason mayor mechanic
    merchant miller miner mother mouse musician neighbor nephew niece nurse officer owner painter parent
    partner passenger patient pig pilot player poet porter postman potter priest prince pupil queen rabbit
    reader rider robber sailor scholar scout sheep shepherd singer sister smith soldier son stranger student
    tailor teacher thief trader train traveler uncle visitor waiter weaver wife wolf""".split()
)
FILLER_VERBS = tuple(
    """admires answers asks avoids blames brings calls carries catches chases cheers comforts copies corrects
    counts draws drops employs envies escorts fears feeds fetches finds follows forgets greets guards guides
    hears heals helps hides hires hugs ignores invites joins judges keeps knows leads leaves likes loses loves
    meets misses needs notices obeys offers owns paints pays phones praises pulls pushes questions reads
    rescues respects scolds seeks sees sells serves shows signals stops studies teaches thanks tricks trusts
    visits warns watches""".split()
)
FILLER_ADJECTIVES = tuple(
    """angry big blind busy careful cheap clean clumsy crazy dirty dry elegant famous fat fine foreign free
    friendly funny generous good great happy heavy honest hungry idle kind lazy light local loud modern
    nervous new nice old plain polite poor pretty quick rich sad serious shy slow small smart strong tall""".split()
)
PREPOSITIONS = tuple("""near behind with for under beside without before after around above past""".split())
ADVERBS = tuple(
    """again alone always badly barely bravely daily easily eagerly firmly gladly happily hardly here kindly
    later loudly never nicely now often outside quickly rarely sadly seldom slowly softly soon there today
    twice""".split()
)

VOCABULARY = (
    *(PAD, BOS, END, UNKNOWN),
    *STRUCTURE,
    *ADJECTIVES,
    *NOUNS,
    *NUMBERS,
    *VARIABLES,
    *DETERMINERS,
    *FILLER_NOUNS,
    *FILLER_VERBS,
    *FILLER_ADJECTIVES,
    *PREPOSITIONS,
    *ADVERBS,
)
TOKEN_IDS = {word: number for number, word in enumerate(VOCABULARY)}
