"""What every objective says of itself; `methods` has those on denoising errors, `methods_reward` those of scorers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from mmalign.config import Strict

ALL = ("eps", "v", "flow")
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Objective(Strict):
    """What every objective says of itself. `{function}(errors..., **{needs}, **{own settings})`."""

    task: ClassVar[str]
    function: ClassVar[str]
    parameterisations: ClassVar[tuple[str, ...]] = ALL
    of_task: ClassVar[tuple[str, ...]] = (
        "kind",
        "reduction",
        "beta_elements",
    )  # settings that the task uses, not the function

    def own(self) -> dict[str, Any]:
        """The settings that the function takes."""
        return {name: value for name, value in self if name not in self.of_task}
