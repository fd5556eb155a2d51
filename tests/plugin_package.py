"""Writes a small installed package with evaluators, as `pip install` would leave it: modules and a dist-info folder."""

from pathlib import Path

SOURCE = '''
import os
import time
from pathlib import Path

import torch

from mmalign.evaluation import AllFrames, Evaluator, SetEvaluator, Strict, Uniform


class Brightness(Evaluator):
    """Mean of all pixels, from 0 to 1."""

    needs = {"frames"}
    modality = {"image", "video"}
    frames = Uniform(2)
    score_range = (0.0, 1.0)
    differentiable = True
    licence, source = "Apache-2.0", "a test"

    class Params(Strict):
        scale: float = 1.0
        log: Path | None = None

    def score(self, batch):
        if self.params.log:
            with open(self.params.log, "a") as file:
                file.write("".join(f"{clip.float().mean():.6f}\\\\n" for clip in batch.clips()))
        return torch.stack([clip.float().mean() / 255 for clip in batch.clips()]) * self.params.scale

    def score_tensor(self, images, prompts):
        return images.mean(dim=(1, 2, 3)) * self.params.scale


class Slow(Brightness):
    """Brightness at a second per so many items, with a note of each item and of the process that scored it."""

    class Params(Strict):
        seconds: float = 0.0
        log: Path | None = None
        scale: float = 1.0

    def score(self, batch):
        time.sleep(self.params.seconds)
        values = torch.stack([clip.float().mean() for clip in batch.clips()])
        with open(self.params.log, "a") as file:
            file.write("".join(f"{os.getpid()} {value:.0f}\\n" for value in values.tolist()))
        return values / 255


class Words(Evaluator):
    """Number of words in the prompt and in the longest word."""

    needs = {"image", "prompt"}
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        if "explode" in batch.prompts:
            raise KeyError("the prompt exploded")
        words = [prompt.split() for prompt in batch.prompts]
        counts = torch.tensor([float(len(w)) for w in words])
        letters = torch.tensor([float(max(map(len, w), default=0)) for w in words])
        return {"words": torch.where(counts == 2, torch.nan, counts), "letters": letters}

    def truncated(self, prompts):
        return [len(prompt.split()) > 3 for prompt in prompts]


class Hungry(Evaluator):
    """Runs out of memory on more than so many items, and on any with a black one; says how many it was given."""

    licence, source = "Apache-2.0", "a test"
    seen = []

    class Params(Strict):
        most: int = 2

    def score(self, batch):
        self.seen.append(len(batch))
        if len(batch) > self.params.most or any(int(image.max()) == 0 for image in batch.images):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.full((len(batch),), float(len(batch)))


class Fatal(Evaluator):
    """Ends its process when it sees a black image."""

    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        if any(int(image.max()) == 0 for image in batch.images):
            os._exit(3)
        return torch.ones(len(batch))


class Moody(Evaluator):
    """Refuses to work in the second process of a launch."""

    licence, source = "Apache-2.0", "a test"

    def __init__(self, params, backbones, device):
        super().__init__(params, backbones, device)
        if os.environ.get("RANK") == "1":
            raise ValueError("not in the mood")

    def score(self, batch):
        return torch.ones(len(batch))


class Spread(SetEvaluator):
    """Standard deviation of the items' brightness."""

    needs = {"frames"}
    licence, source = "Apache-2.0", "a test"
    frames = AllFrames()

    def __init__(self, params, backbones, device):
        super().__init__(params, backbones, device)
        self.values = []

    def update(self, batch):
        self.values += [float(clip.float().mean()) / 255 for clip in batch.clips()]

    def compute(self):
        return float(torch.tensor(self.values).double().std())


class Neighbourly(Evaluator):
    """Brightness relative to the batch's, which breaks the contract."""

    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        values = torch.stack([image.float().mean() for image in batch.images])
        return values - values.mean()


class Unbounded(Evaluator):
    """Says 0 to 1 and returns up to 255."""

    score_range = (0.0, 1.0)
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        return torch.stack([image.float().mean() for image in batch.images])


class Nameless(Evaluator):
    """Declares no licence."""

    source = "a test"

    def score(self, batch):
        return torch.zeros(len(batch))


class Agreement(Evaluator):
    """Whether an answer, yes or no, is the table's label; looks at no pixels and has figures of the whole table."""

    needs = {"response", "aux"}
    modality = {"image", "video", "text"}
    licence, source = "Apache-2.0", "a test"
    counts = {"yes", "due"}

    def score(self, batch):
        for response in batch.responses:
            if response not in ("yes", "no", ""):
                raise ValueError(f"no answer in {response!r}")
        said = torch.tensor([response == "yes" for response in batch.responses])
        due = torch.tensor([one["label"] == "yes" for one in batch.aux])
        return {"right": (said == due).double(), "yes": said.double(), "due": due.double()}

    @classmethod
    def figures(cls, params, rows):
        yes = [row for row in rows if row["scores"]["yes"]]
        assert all(row["aux"]["label"] in ("yes", "no") for row in rows)
        found = sum(row["scores"]["due"] for row in yes)
        return {"yes_ratio": len(yes) / len(rows), "precision": found / len(yes) if yes else None}
'''.replace("\\\\n", "\\n")

NAMES = (
    "Brightness",
    "Slow",
    "Words",
    "Hungry",
    "Fatal",
    "Moody",
    "Spread",
    "Neighbourly",
    "Unbounded",
    "Nameless",
    "Agreement",
)


def install(
    folder: Path, entries: dict[str, str] | None = None, distribution: str = "plug_in", source: str = SOURCE
) -> Path:
    """Put the package into a folder that is, or will be, on sys.path."""
    entries = entries or {name.lower(): f"{distribution}_code:{name}" for name in NAMES}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{distribution}_code.py").write_text(source)
    info = folder / f"{distribution}-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution.replace('_', '-')}\nVersion: 1.2.3\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[mmalign.evaluators]\n{lines}")
    return folder
