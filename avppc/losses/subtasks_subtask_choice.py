"""Which sub-tasks are learned, from a text such as "1to1,Vp,Ap->Vf"."""

from __future__ import annotations

from collections.abc import Sequence

from avppc.losses.permutative_info_nce import SIZE_GROUPS, SubTask

GROUPS = (*SIZE_GROUPS, "between", "within", "mixed")


def modality_group(subtask: SubTask) -> str:
    """ "between": sound from picture alone, or the reverse; "within": one modality only; "mixed": all others."""
    if subtask.between_modalities:
        return "between"
    return "within" if len({element[0] for element in (*subtask.inputs, *subtask.targets)}) == 1 else "mixed"


def choose_subtasks(available: Sequence[SubTask], chosen: str = "", excluded: str = "") -> tuple[SubTask, ...]:
    """The sub-tasks that `chosen` names (all for ""), in their order, without those that `excluded` names.

    Raises:
        ValueError: a text names no group or sub-task, is ambiguous, or leaves nothing.
    """
    for name, text in (("subtasks", chosen), ("exclude", excluded)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str, got {type(text).__name__}")
    wanted = _named("subtasks", chosen, available) if chosen else set(available)
    unwanted = _named("exclude", excluded, available) if excluded else set()
    left = tuple(subtask for subtask in available if subtask in wanted and subtask not in unwanted)
    if not left:
        raise ValueError(f"subtasks={chosen!r} without exclude={excluded!r} leaves no sub-task to learn")
    return left


def _named(argument: str, text: str, available: Sequence[SubTask]) -> set[SubTask]:
    members = {group: {task for task in available if group in (task.group, modality_group(task))} for group in GROUPS}
    members |= {task.name: {task} for task in available}
    readings = _readings(text.replace(" ", "").split(","), members.keys())
    if len(readings) > 1:
        raise ValueError(f"{argument}: {text!r} can be read as {' or '.join(map(' and '.join, readings))}")
    if not readings:
        raise ValueError(
            f"{argument} must hold groups ({', '.join(GROUPS)}) or sub-tasks such as {available[-1].name!r}, with "
            f"commas between them; got {text!r}"
        )
    return set().union(*(members[name] for name in readings[0]))


def _readings(words: list[str], names: object) -> list[list[str]]:
    """Every way to join the words into names; a name has at most two commas of its own."""
    if not words:
        return [[]]
    found = []
    for length in (1, 2, 3):
        name = ",".join(words[:length])
        if len(words) >= length and name in names:  # type: ignore[operator]  # a set of keys
            found += [[name, *rest] for rest in _readings(words[length:], names)]
    return found
