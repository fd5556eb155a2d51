"""Small files in the layouts of benchmarks of answers, and evaluators run on answers in memory."""

import json

from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch
from mmalign.jobs import EvaluatorSpec, ScoreConfig


def judge(name, items, **params):
    """What an evaluator says of (response, aux, group), and its figures."""
    evaluator = load_evaluator(name, params, "cpu")
    batch = Batch(responses=[item[0] for item in items], aux=[item[1] for item in items])
    scores = {key: values.tolist() for key, values in evaluator.score(batch).items()}
    rows = [
        {
            "sample": str(place),
            "group": item[2] if len(item) > 2 else str(place),
            "aux": item[1],
            "scores": {key: values[place] for key, values in scores.items()},
        }
        for place, item in enumerate(items)
    ]
    return scores, evaluator.figures(evaluator.params, rows)


def json_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def json_list(path, rows):
    path.write_text(json.dumps(rows))
    return path


def pope_file(path, labels):
    rows = [
        {"question_id": number, "image": f"COCO_{number // 3}.jpg", "text": f"Is there a {number}?", "label": label}
        for number, label in enumerate(labels, 1)
    ]
    return json_lines(path, rows)


def config(output, *evaluators, **benchmark):
    specs = tuple(EvaluatorSpec(name=name) for name in evaluators)
    return ScoreConfig(benchmark=benchmark, output=output, evaluators=specs, device="cpu")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())["evaluators"]
