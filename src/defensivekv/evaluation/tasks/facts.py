"""Small facts that no model has read before: a number for a city, one question each."""

from dataclasses import dataclass
from random import Random

from defensivekv.errors import InvalidInputError

_CITIES = (
    "Aberdeen Adelaide Antwerp Bergen Bologna Bordeaux Bremen Brno Calgary Cardiff Cordoba Cork Dakar Debrecen Denver "
    "Dresden Durban Freiburg Galway Geneva Ghent Glasgow Graz Halifax Hobart Izmir Kobe Krakow Lausanne Leeds Leipzig "
    "Lima Lisbon Malmo Mombasa Nantes Naples Odense Oslo Ottawa Palermo Perth Porto Quito Riga Salzburg Santiago "
    "Seville Tampere Tartu Toulouse Trieste Turin Utrecht Valencia Verona Vilnius Warsaw Winnipeg Zagreb"
).split()


@dataclass(frozen=True)
class Fact:
    """city: one word. number: seven digits, as text."""

    city: str
    number: str

    @property
    def sentence(self) -> str:
        """What a document says."""
        return f"The registry number of the city of {self.city} is {self.number}."

    @property
    def question(self) -> str:
        """What is asked about it."""
        return f"What is the registry number of the city of {self.city}?"


def draw_facts(rng: Random, num_facts: int, text: str) -> list[Fact]:
    """Facts of different cities and numbers, neither of which the text holds.

    Raises InvalidInputError for a text that names nearly all of the sixty cities.
    """
    unnamed = [city for city in _CITIES if city not in text]
    if len(unnamed) < num_facts:
        raise InvalidInputError(f"the prose leaves {len(unnamed)} cities for {num_facts} facts: name other essays")
    cities = rng.sample(unnamed, num_facts)
    numbers: list[str] = []
    while len(numbers) < num_facts:
        number = str(rng.randrange(1_000_000, 10_000_000))
        if number not in text and number not in numbers:
            numbers.append(number)
    return [Fact(city, number) for city, number in zip(cities, numbers, strict=True)]
