"""Local language models that prepare questions: one that writes them, one that says whether a prompt entails them.

Scoring reads a question file; this writes one, once::

    python -m mmalign.backbones.question_writer --model llama-3-8b --prompts prompts.csv --output questions.jsonl

A prompt whose questions are in the file already is not asked again.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmalign.backbones.prompt_questions import Question, read_prompts, read_questions, uncovered, write_questions
from mmalign.backbones.vlm_loading import load_text_parts

__all__ = ["Entailment", "Writer", "load_entailment", "load_writer", "parse_questions", "write_file"]

INSTRUCTION = """Someone wants to check whether an image shows what its caption says. For each word of the caption \
that can be seen in an image, write one line with four parts:
word | question about the image | possible answers, separated by / | the answer that fits the caption
For example, for the caption "two red birds":
two | How many birds are there? | one / two / three | two
red | Are the birds red? | yes / no | yes
birds | Are there birds? | yes / no | yes
Write nothing else. The caption is: {prompt}
"""


OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert")
_MARKER = re.compile(r"^\s*(?:[-*]|\d+[.)])\s+")  # of a list; digits of a word ("3D") are no marker


class Writer:
    """A causal language model that writes questions about a prompt, greedily."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device):
        self._model = model.eval().requires_grad_(False).to(device)
        self._tokenizer = tokenizer

    @torch.no_grad()
    def questions(self, prompt: str, max_new_tokens: int = 1024) -> tuple[Question, ...]:
        """Questions about an image of this prompt.

        Raises:
            ValueError: not one line of what the model wrote is a question.
        """
        from transformers import GenerationConfig

        text = INSTRUCTION.replace("{prompt}", prompt)
        if getattr(self._tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": text}]
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        bos = self._tokenizer.bos_token
        first = not (bos and text.startswith(bos))
        inputs = self._tokenizer(text, return_tensors="pt", add_special_tokens=first).to(self._model.device)
        ends = self._model.generation_config.eos_token_id or self._tokenizer.eos_token_id
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=self._tokenizer.pad_token_id
        )
        kept, self._model.generation_config = self._model.generation_config, greedy
        try:
            ids = self._model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=greedy
            )[0, inputs["input_ids"].shape[1] :]
        finally:
            self._model.generation_config = kept
        written = self._tokenizer.decode(ids, skip_special_tokens=True)
        found = parse_questions(written)
        if not found:
            raise ValueError(f"The language model wrote no question about '{prompt}': {written.strip()[:200]!r}")
        return found


def parse_questions(written: str) -> tuple[Question, ...]:
    """Questions from lines of ``word | question | answers | right answer``.

    Other lines are left out, also those whose right answer is not among the answers: what is then not asked about
    shows in the coverage.
    """
    found: list[Question] = []
    for line in written.splitlines():
        parts = [part.strip() for part in _MARKER.sub("", line).split("|")]
        if len(parts) != 4:
            continue
        word, text, choices, answer = parts
        options = tuple(dict.fromkeys(option.strip().casefold() for option in choices.split("/")))
        try:
            found.append(Question(text, options, answer.casefold(), (word,) if word else ()))
        except ValueError:
            continue
    return tuple(dict.fromkeys(found))


class Entailment:
    """A natural-language-inference model: how surely a premise entails a hypothesis."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device):
        self._model = model.eval().requires_grad_(False).to(device)
        self._tokenizer = tokenizer
        labels = {str(name).casefold(): int(index) for index, name in model.config.id2label.items()}
        if "entailment" not in labels:
            raise ValueError(
                f"nli: the model's labels are {', '.join(labels)}; one has to be 'entailment' (id2label of its config)."
            )
        self._label = labels["entailment"]
        self._limit = _limit(model.config)

    @torch.no_grad()
    def probability(self, premise: str, hypotheses: Sequence[str]) -> list[float]:
        """P(entailment) of each hypothesis, each in a pass of its own; softmax in float32.

        Raises:
            ValueError: premise and hypothesis are longer than the model reads; nothing is cut off.
        """
        chances = []
        for hypothesis in hypotheses:
            inputs = self._tokenizer(premise, hypothesis, truncation=False, return_tensors="pt")
            length = inputs["input_ids"].shape[1]
            if length > self._limit:
                raise ValueError(
                    f"nli: the prompt with the hypothesis '{hypothesis[:100]}' has {length} tokens, and the model "
                    f"reads {self._limit}; shorten the prompt, or give another model."
                )
            inputs = inputs.to(self._model.device)
            logits = self._model(**inputs).logits[0].float()
            chances.append(float(logits.softmax(dim=-1)[self._label]))
        return chances


def _limit(config: Any) -> float:
    """Tokens that a model reads: without end where its config names none."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return math.inf
    # RoBERTa's positions begin behind the padding's, so that many embeddings are never a token's.
    before = int(config.pad_token_id) + 1 if config.model_type in OFFSET_POSITIONS else 0
    return int(positions) - before


def load_writer(*, folder: str, device: torch.device, dtype: torch.dtype) -> Writer:
    """Loader for a `BackboneSpec`: a folder that AutoModelForCausalLM and AutoTokenizer read; ValueError if not."""
    from transformers import AutoModelForCausalLM

    return Writer(*load_text_parts(AutoModelForCausalLM, folder, dtype, "writer"), device)


def load_entailment(*, folder: str, device: torch.device, dtype: torch.dtype) -> Entailment:
    """Loader for a `BackboneSpec`: a folder of a sequence classifier with a label ``entailment``; ValueError if not."""
    from transformers import AutoModelForSequenceClassification

    return Entailment(*load_text_parts(AutoModelForSequenceClassification, folder, dtype, "nli"), device)


def write_file(writer: Writer, prompts: Sequence[str], path: str | Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Questions for every prompt into a JSONL file, those that are there already kept; written after each prompt.

    Returns:
        For each prompt that has questions the words that none covers; for each other prompt what went wrong with it.
    """
    path = Path(path)
    known = dict(read_questions(path)) if path.exists() else {}
    failed: dict[str, str] = {}
    for prompt in prompts:
        if prompt not in known:
            try:
                known[prompt] = writer.questions(prompt)
            except ValueError as error:
                failed[prompt] = str(error)
                continue
            write_questions(path, known)
    return {prompt: uncovered(prompt, known[prompt]) for prompt in prompts if prompt in known}, failed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command in the module's docstring; a line for each prompt with uncovered words, or without questions.

    Returns:
        0; 1 where prompts are left without questions; 2 where nothing could be begun.
    """
    parser = argparse.ArgumentParser(prog="python -m mmalign.backbones.question_writer", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--prompts", required=True, help="CSV with a column prompt, or a text file with one per line")
    parser.add_argument("--output", required=True, help="question file to write (JSONL)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args(arguments)
    try:
        device, dtype = torch.device(given.device), getattr(torch, given.dtype)
        writer = load_writer(folder=given.model, device=device, dtype=dtype)
        left, failed = write_file(writer, read_prompts(given.prompts), given.output)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for prompt, words in left.items():
        if words:
            print(f"{prompt}: no question covers {', '.join(words)}")
    for reason in failed.values():
        print(reason, file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(left) + len(failed)} prompts have no questions.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
