"""Vision-language models and their answers: preference rows, objectives, and the benchmarks of hallucination."""
