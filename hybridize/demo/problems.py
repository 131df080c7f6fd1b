"""Word problems that a small model can only solve by retrieval and step-by-step arithmetic.

Each problem names some people and how many things each has, in shuffled order and mostly relative
to one another. The solution first goes back from the person in question to the one whose count is
given, then forward again, with one arithmetic step per sentence. Independent of models and tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = [
    "Ana",
    "Ben",
    "Cal",
    "Dee",
    "Eli",
    "Fay",
    "Gus",
    "Hal",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Ola",
    "Pam",
    "Ray",
    "Sue",
    "Tom",
    "Una",
]
THINGS = ["apples", "books", "coins", "cards", "keys", "pens", "shells", "stamps"]


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution, and the integer answer (0..99)."""

    question: str
    solution: str
    answer: int

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.solution}]

    def last_step(self) -> tuple[str, list[str]]:
        """The solution up to its last computed number, and four candidates for that number, the
        right one first."""
        head, right = self.solution.split(" The answer is ")[0].removesuffix(".").rsplit("=", 1)
        near = (int(right) + step for step in (10, -10, 1, -1, 11, -11))
        wrong = [value for value in near if 0 <= value <= 99][:3]
        return head + "=", [f"{number}." for number in (right, *wrong)]  # with a full stop, since "1" is a prefix of "10"


def make_problem(rng: random.Random, *, people: tuple[int, int] = (3, 5), depth: tuple[int, int] = (2, 3)) -> Problem:
    """Draws one problem. people, depth: inclusive bounds of the number of people and of the steps
    in the chain."""
    while True:
        problem = _attempt(rng, people, depth)
        if problem is not None:
            return problem


def _attempt(rng: random.Random, people: tuple[int, int], depth: tuple[int, int]) -> Problem | None:
    count = rng.randint(*people)
    steps = min(rng.randint(*depth), count - 1)
    names = rng.sample(NAMES, count)
    thing = rng.choice(THINGS)
    value = {names[0]: rng.randint(2, 60)}
    facts = [f"{names[0]} has {value[names[0]]} {thing}."]
    work = [" from ".join(names[steps::-1]) + f". {names[0]} has {value[names[0]]}."]
    for index, name in enumerate(names[1:], start=1):
        # The people up to index `steps` form the chain; the others are distractors, relative to any
        # earlier person.
        source = names[index - 1] if index <= steps else rng.choice(names[:index])
        before, change = value[source], rng.randint(2, 39)
        if rng.random() < 0.5:
            value[name] = before + change
            fact, step = f"{name} has {change} more than {source}.", f"{before}+{change}"
        else:
            value[name] = before - change
            fact, step = f"{name} has {change} fewer than {source}.", f"{before}-{change}"
        if not 0 <= value[name] <= 99:
            return None
        facts.append(fact)
        if index <= steps:
            work.append(f"{name} has {step}={value[name]}.")
    rng.shuffle(facts)
    asked = names[steps]
    question = " ".join([*facts, f"How many {thing} does {asked} have?"])
    return Problem(question, " ".join([*work, f"The answer is {value[asked]}."]), value[asked])


def make_problems(count: int, seed: int, *, exclude: frozenset[str] = frozenset()) -> list[Problem]:
    """`count` problems with distinct questions, none of them in `exclude`."""
    problems: list[Problem] = []
    rng, seen = random.Random(seed), set(exclude)
    while len(problems) < count:
        problem = make_problem(rng)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems
