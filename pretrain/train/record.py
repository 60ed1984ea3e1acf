"""What a run knows of itself beside its weights: saved with each checkpoint, so that a resumed run decides the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from data_prep.errors import InputError


@dataclass
class RunRecord:
    step: int = 0  # steps done
    #: losses of the newest steps, of which a spike is told
    recent_losses: list[float] = field(default_factory=list)
    #: steps whose batch was passed over (see BadStepConfig), ascending
    passed_over: list[int] = field(default_factory=list)
    best_step: int | None = None  # in the sense of checkpoint.best_by
    best_value: float | None = None
    validated_step: int | None = None  # the newest
    best_of: str = ""  # the validation that it is the best of
    order_of: str = ""  # what the streaming mode's sample order depends on beside seed and data

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunRecord:
        """Raises InputError for the record of another version."""
        known = {each.name for each in fields(cls)}
        if strange := [name for name in values if name not in known]:
            raise InputError(
                f"the checkpoint's record holds {', '.join(strange)}: it is of another version of dermvlp; go on with "
                "that one, or begin anew in another run_dir"
            )
        return cls(**values)
