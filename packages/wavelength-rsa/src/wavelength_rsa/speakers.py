"""Speakers: which clue for a target? Sampled from a model, or chosen with a listener in mind (RSA).

A task is a scale and a target. A speaker answers with candidates and how probable each is, so that
it can be evaluated without the noise of drawing one.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold_common.errors import UserError, suggest
from wavelength_rsa.listeners import (
    Listener,
    Question,
    check_count,
    check_number,
    check_question,
    draw_readable,
    tokens_for,
)
from wavelength_rsa.prompts import Prompts, prompts_for
from wavelength_rsa.rsa import RSA, production
from wavelength_rsa.rules import DEFAULT_RULES, Rules, check_clue
from wavelength_rsa.scales import Scale, check_position, fold, grid, grid_index, tidy

if TYPE_CHECKING:
    from tenfold_common.lm import TextModel

Array: TypeAlias = NDArray[np.float64]
Task: TypeAlias = tuple[Scale, float]
OnViolation: TypeAlias = Literal["keep", "drop", "raise"]
Utility: TypeAlias = Literal["log_prob", "neg_expected_distance", "neg_w1"]
Select: TypeAlias = Literal["sample", "argmax"]
Cost: TypeAlias = Callable[[str], float] | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Candidates:
    """The clues a speaker considers for one task.

    Attributes:
        clues: c different clues.
        counts: How often each was sampled, `[c]`, int64.
        prior: How probable each was before the choice, `[c]`: of a sampling speaker `probs` itself,
            of a pragmatic one the `probs` of the speaker that proposes.
        probs: How probable it is that the speaker says each, `[c]`.
        listener: What the imagined listener gives the target after each, L0(target | clue), `[c]`;
            None without such a listener.
        violations: For each the codes of the rules it breaks, see `wavelength_rsa.rules`.
        refused: Number of samples with no clue in them.
    """

    clues: tuple[str, ...]
    counts: NDArray[np.int64]
    prior: Array
    probs: Array
    listener: Array | None
    violations: tuple[tuple[str, ...], ...]
    refused: int

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one JSON object per clue: clue, count, prior, prob, listener, violations."""
        heard = [None] * len(self.clues) if self.listener is None else self.listener.tolist()
        return [
            {"clue": clue, "count": c, "prior": p, "prob": q, "listener": h, "violations": list(v)}
            for clue, c, p, q, h, v in zip(
                self.clues, self.counts.tolist(), self.prior.tolist(), self.probs.tolist(), heard,
                self.violations, strict=True,
            )
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the candidates as JSON: `{"refused": ..., "candidates": to_rows()}`."""
        return {"refused": self.refused, "candidates": self.to_rows()}


@dataclass(frozen=True)
class Utterance:
    """A clue that was said.

    Attributes:
        clue: The clue.
        candidates: What it was drawn from.
        flagged: It breaks a rule.
    """

    clue: str
    candidates: Candidates
    flagged: bool


class Speaker(ABC):
    """Base of all speakers: a subclass gives `_propose` and `describe`.

    Attributes:
        name: What to call it in results.
    """

    name: str

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what decides the clues, as JSON: class, model, prompt hash, settings."""

    def models(self) -> "list[TextModel]":
        """Return the models that propose clues; none for a speaker without one."""
        return []

    @abstractmethod
    def _propose(self, tasks: list[Task], seed: int) -> list[Candidates]:
        """Return the candidates for tasks that were checked, at least one."""

    def propose(self, tasks: Sequence[Task], *, seed: int = 0) -> list[Candidates]:
        """Return the candidates for every task, at least one each.

        Args:
            tasks: Pairs of scale and target, 0 to 100.
            seed: Fixes what is random, from 0 to 2**32 - 1.

        Raises:
            UserError: a task is none, a model said no clue for one, or (by option) all its clues
                break the rules.
        """
        checked = [_task(task) for task in tasks]
        return self._propose(checked, seed) if checked else []

    def speak(self, scale: Scale, target: float, *, seed: int = 0) -> Utterance:
        """Say one clue, drawn from the candidates' probabilities.

        Args:
            scale: The scale.
            target: The position to convey, 0 to 100.
            seed: Fixes the candidates and which is drawn.

        Raises:
            UserError: see `propose`.
        """
        [candidates] = self.propose([(scale, target)], seed=seed)
        clue = self.draw(candidates, seed=seed)
        return Utterance(
            clue, candidates, bool(candidates.violations[candidates.clues.index(clue)])
        )

    def draw(self, candidates: Candidates, *, seed: int = 0) -> str:
        """Return one of the clues, drawn from `candidates.probs`."""
        random = np.random.default_rng(seed)
        return candidates.clues[random.choice(len(candidates.clues), p=candidates.probs)]


class SamplingSpeaker(Speaker):
    """Asks a model for a clue many times; how often a clue comes is how probable it is.

    This is the paper's direct speaker, and with `cot` the one that reasons first. Spellings that
    differ in case and white space are one candidate, in its most frequent spelling.

    Args:
        model: Any `tenfold_common.lm` model.
        prompts: The texts. Defaults to `prompts_for(model)`.
        num_candidates: Samples per task, at least 1.
        cot: Let the model think step by step.
        temperature: Of the samples; at 0 all are alike.
        max_tokens: Of one reply. Defaults to 24, with cot to 1024.
        rules: The rules for clues; None for no rules.
        on_violation: "keep" says clues that break a rule like others. "drop" gives them no
            probability; if all break one, those that break the fewest are said. "raise" drops them
            too, but raises if all break one.
        max_retries: How often to ask again where no reply holds a clue, at least 0.

    Raises:
        UserError: a setting is not accepted.
    """

    def __init__(
        self,
        model: "TextModel",
        prompts: Prompts | None = None,
        *,
        num_candidates: int = 32,
        cot: bool = False,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        rules: Rules | None = DEFAULT_RULES,
        on_violation: OnViolation = "keep",
        max_retries: int = 10,
    ) -> None:
        check_count("num_candidates", num_candidates)
        check_count("max_retries", max_retries, least=0)
        check_number("temperature", temperature)
        _check_choice("on_violation", on_violation, get_args(OnViolation))
        self.model = model
        self.prompts = prompts if prompts is not None else prompts_for(model)
        self.num_candidates, self.cot, self.temperature = num_candidates, cot, temperature
        self.max_tokens = tokens_for(cot) if max_tokens is None else max_tokens
        check_count("max_tokens", self.max_tokens)
        self.rules, self.on_violation, self.max_retries = rules, on_violation, max_retries
        self.name = f"{model.name} ({'reasoning' if cot else 'direct'})"

    def describe(self) -> dict[str, Any]:
        """Return the model, the prompts' hash and the settings."""
        rules = self.rules
        return {
            "class": type(self).__name__,
            "model": self.model.name,
            "prompts": self.prompts.hash,
            "num_candidates": self.num_candidates,
            "cot": self.cot,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "rules": rules and {**asdict(rules), "banned": list(rules.banned)},
            "on_violation": self.on_violation,
            "max_retries": self.max_retries,
        }

    def models(self) -> "list[TextModel]":
        """Return the model."""
        return [self.model]

    def _propose(self, tasks: list[Task], seed: int) -> list[Candidates]:
        draws, _ = draw_readable(
            self.model,
            [self.prompts.speaker(scale, target, cot=self.cot) for scale, target in tasks],
            lambda text: self.prompts.read_clue(text, cot=self.cot),
            n=self.num_candidates,
            least=1,
            retries=self.max_retries,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            stop=() if self.cot else self.prompts.clue_stop,
            seed=seed,
        )
        for (scale, target), draw in zip(tasks, draws, strict=True):
            if not draw.values:
                raise draw.error(f"for target {target:g} on {scale} held a clue")
        return [
            self._candidates(scale, target, draw.values, draw.unusable)
            for (scale, target), draw in zip(tasks, draws, strict=True)
        ]

    def _candidates(
        self, scale: Scale, target: float, sampled: list[str], refused: int
    ) -> Candidates:
        spellings: dict[str, Counter[str]] = {}
        for clue in map(tidy, sampled):
            spellings.setdefault(fold(clue), Counter())[clue] += 1
        clues = tuple(spelt.most_common(1)[0][0] for spelt in spellings.values())
        counts = np.array([spelt.total() for spelt in spellings.values()], dtype=np.int64)
        rules = self.rules
        violations = tuple(
            tuple(v.code for v in check_clue(clue, scale, rules)) if rules else () for clue in clues
        )
        broken = np.array([len(codes) for codes in violations])
        if self.on_violation == "raise" and broken.all():
            shown = "; ".join(
                f"{c!r}: {', '.join(v)}" for c, v in zip(clues, violations, strict=True)
            )
            raise UserError(
                f"every clue for target {target:g} on {scale} breaks a rule ({shown:.300}); sample "
                "more candidates, or use on_violation='drop' to take the least bad"
            )
        allowed = broken == broken.min() if self.on_violation != "keep" else broken >= 0
        kept = np.where(allowed, counts, 0)
        probs = kept / kept.sum()
        return Candidates(clues, counts, probs, probs, None, violations, refused)


class RSASpeaker(Speaker):
    """Chooses among another speaker's clues the one that a listener would decode best.

    S1(u | t) is proportional to exp(alpha U(u, t) - cost(u)) P_t(u)^lambda over the clues that the
    other speaker proposes for t, with P_t the probabilities it gives them. The defaults are the
    paper's pragmatic speaker: U = log L0(t | u), alpha = lambda = 1, no cost.

    Args:
        speaker: Proposes the clues.
        listener: The listener that is imagined, L0. To be fair it is not the one that judges.
        alpha: Weight of being understood, >= 0.
        prior_weight: lambda, weight of the proposal, >= 0.
        cost: Function from a clue to its cost, or `{"words": c}` for c per word.
        utility: "log_prob"; or -E|t' - t| / tau under L0(. | u), to which a near miss is nearly as
            good as a hit: "neg_expected_distance", which for a single target equals "neg_w1".
        tau: Points that count as one nat, above 0; for the distances only.
        select: "sample" says clues with their probability, "argmax" only the most probable.

    Raises:
        UserError: a setting is not accepted.
    """

    def __init__(
        self,
        speaker: Speaker,
        listener: Listener,
        *,
        alpha: float = 1.0,
        prior_weight: float = 1.0,
        cost: Cost | None = None,
        utility: Utility = "log_prob",
        tau: float = 10.0,
        select: Select = "sample",
    ) -> None:
        _check_choice("utility", utility, get_args(Utility))
        _check_choice("select", select, get_args(Select))
        check_number("alpha", alpha, infinite=True)
        check_number("prior_weight", prior_weight)
        check_number("tau", tau, above=True)
        if isinstance(cost, Mapping) and set(cost) != {"words"}:
            raise UserError(f"cost must be a function or {{'words': number}}, not {cost!r}")
        self.speaker, self.listener = speaker, listener
        self.alpha, self.prior_weight, self.cost = alpha, prior_weight, cost
        self.utility, self.tau, self.select = utility, tau, select
        self.name = f"RSA over {speaker.name}, imagining {listener.name}"

    def describe(self) -> dict[str, Any]:
        """Return the settings and what speaker and listener say of themselves."""
        cost = self.cost
        named = (
            dict(cost) if isinstance(cost, Mapping) else getattr(cost, "__qualname__", repr(cost))
        )
        return {
            "class": type(self).__name__,
            "alpha": _json_number(self.alpha),
            "prior_weight": self.prior_weight,
            "cost": cost and named,
            "utility": self.utility,
            "tau": self.tau,
            "select": self.select,
            "speaker": self.speaker.describe(),
            "listener": self.listener.describe(),
        }

    def models(self) -> "list[TextModel]":
        """Return the models that propose; `listener.models()` has those of the imagined one."""
        return self.speaker.models()

    def _propose(self, tasks: list[Task], seed: int) -> list[Candidates]:
        places = [grid_index(target, self.listener.step) for _, target in tasks]
        proposals = self.speaker.propose(tasks, seed=seed)
        questions = [
            (scale, clue)
            for (scale, _), candidates in zip(tasks, proposals, strict=True)
            for clue in candidates.clues
        ]
        heard = self.listener.listen(questions, seed=seed)  # [sum of c, n]
        ends = np.cumsum([len(candidates.clues) for candidates in proposals])[:-1]
        return [
            self._chosen(task, candidates, rows, place)
            for task, candidates, rows, place in zip(
                tasks, proposals, np.split(heard, ends), places, strict=True
            )
        ]

    def _chosen(self, task: Task, candidates: Candidates, heard: Array, place: int) -> Candidates:
        said = candidates.probs > 0  # the others were dropped, by the rules
        with np.errstate(divide="ignore"):
            utility = np.log(heard[:, place])
        if self.utility != "log_prob":
            utility = -heard @ np.abs(grid(self.listener.step) - task[1]) / self.tau
        cost = np.array([self._cost(clue) for clue in candidates.clues])
        try:
            log_probs = production(
                utility[said], candidates.probs[said], self.alpha, self.prior_weight, cost[said]
            )
        except UserError as error:
            raise UserError(f"target {task[1]:g} on {task[0]}: {error}") from error
        probs = np.zeros(len(said))
        probs[said] = np.exp(log_probs)
        if self.select == "argmax":
            probs = (probs >= probs.max() * (1 - 1e-9)).astype(np.float64)
        return replace(
            candidates,
            prior=candidates.probs,
            probs=probs / probs.sum(),
            listener=heard[:, place],
        )

    def _cost(self, clue: str) -> float:
        if self.cost is None:
            return 0.0
        if isinstance(self.cost, Mapping):
            return float(self.cost["words"]) * len(clue.split())
        return float(self.cost(clue))


class RSAListener(Listener):
    """A listener that asks why the speaker said this clue and none of the others (RSA's L1).

    The alternatives to a clue are all clues that a speaker gives for any target of the scale, each
    once and with equal weight, and a null utterance that says nothing.

    Args:
        listener: The literal listener L0.
        alternatives: A speaker, asked for clues to every target of the grid; or for every scale a
            list of clues.
        alpha: Rationality of the imagined speaker, >= 0.
        depth: How often the two reason about each other; 0 is the literal listener.
        null: Include the null utterance.
        state_prior: What is expected before any clue, `[n]`. Defaults to uniform.

    The alternatives of a scale are asked for and heard once, and kept: make another for a model
    whose weights have changed.

    Raises:
        UserError: a setting is not accepted.
    """

    def __init__(
        self,
        listener: Listener,
        alternatives: Speaker | Mapping[Scale, Sequence[str]],
        *,
        alpha: float = 1.0,
        depth: int = 1,
        null: bool = True,
        state_prior: ArrayLike | None = None,
    ) -> None:
        self.listener, self.alternatives = listener, alternatives
        self.alpha, self.step = alpha, listener.step
        prior = None if state_prior is None else np.asarray(state_prior, dtype=np.float64)
        self.rsa = RSA(
            alpha=alpha, depth=depth, null="uniform" if null else None, state_prior=prior
        )
        self.name = f"RSA over {listener.name}"
        self._known: dict[tuple[Scale, int], dict[str, Array]] = {}

    def describe(self) -> dict[str, Any]:
        """Return the settings, the literal listener and where the alternatives come from."""
        prior = self.rsa.state_prior
        if isinstance(self.alternatives, Speaker):
            alternatives: dict[str, Any] = self.alternatives.describe()
        else:
            listed = [[s.left, s.right, list(c)] for s, c in self.alternatives.items()]
            alternatives = {
                "class": "table",
                "clues": sum(len(clues) for _, _, clues in listed),
                "hash": sha256(json.dumps(listed).encode()).hexdigest(),
            }
        return {
            "class": type(self).__name__,
            "alpha": _json_number(self.alpha),
            "depth": self.rsa.depth,
            "null": self.rsa.null is not None,
            "state_prior": None if prior is None else np.asarray(prior).tolist(),
            "listener": self.listener.describe(),
            "alternatives": alternatives,
        }

    def models(self) -> "list[TextModel]":
        """Return the models of the literal listener and of the speaker of the alternatives."""
        alternatives = self.alternatives
        speaking = alternatives.models() if isinstance(alternatives, Speaker) else []
        return self.listener.models() + speaking

    def _listen(self, questions: list[Question], seed: int) -> Array:
        known = {scale: self._alternatives(scale, seed) for scale, _ in questions}
        new = [(scale, clue) for scale, clue in questions if clue not in known[scale]]
        literal = dict(zip(new, self.listener.listen(new, seed=seed), strict=True))
        return np.stack(
            [
                self._pragmatic(clue, literal.get((scale, clue)), known[scale])
                for scale, clue in questions
            ]
        )

    def _pragmatic(self, clue: str, heard: Array | None, known: dict[str, Array]) -> Array:
        """Return L1 of one clue; other spellings of it are no alternatives to it."""
        rows = [known[clue] if heard is None else heard]
        rows += [row for other, row in known.items() if fold(other) != fold(clue)]
        with np.errstate(divide="ignore"):
            return self.rsa.listener(np.log(np.stack(rows)))[0]

    def _alternatives(self, scale: Scale, seed: int) -> dict[str, Array]:
        """Return L0 `[n]` of every alternative on a scale.

        One scale at a time, so that what is sampled does not depend on which other scales came
        before.
        """
        if (scale, seed) not in self._known:
            spelt: dict[str, str] = {}
            for clue in self._clues(scale, seed):
                spelt.setdefault(fold(clue), clue)
            rows = self.listener.listen([(scale, clue) for clue in spelt.values()], seed=seed)
            self._known[scale, seed] = dict(zip(spelt.values(), rows, strict=True))
        return self._known[scale, seed]

    def _clues(self, scale: Scale, seed: int) -> list[str]:
        if isinstance(self.alternatives, Speaker):
            tasks = [(scale, float(target)) for target in grid(self.step)]
            return [
                clue
                for candidates in self.alternatives.propose(tasks, seed=seed)
                for clue, prob in zip(candidates.clues, candidates.probs, strict=True)
                if prob > 0
            ]
        if scale not in self.alternatives:
            names = [str(known) for known in self.alternatives]
            raise UserError(
                f"there are no alternatives for the scale {scale}; there are some for "
                f"{len(names)} scales.{suggest(str(scale), names)}"
            )
        clues = self.alternatives[scale]
        if isinstance(clues, str):
            raise UserError(f"the alternatives for {scale} must be a list of clues, not {clues!r}")
        return [check_question((scale, clue))[1] for clue in clues]


def _task(task: Task) -> Task:
    if not isinstance(task, tuple) or len(task) != 2 or not isinstance(task[0], Scale):
        raise UserError(f"a task is a pair (Scale, target), not {task!r}")
    return task[0], check_position(task[1])


def _json_number(value: float) -> float | str:
    return "inf" if value == np.inf else value


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(
            f"{name} must be one of {', '.join(known)}, not {value!r}.{suggest(str(value), known)}"
        )
