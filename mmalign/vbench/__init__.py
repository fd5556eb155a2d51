"""VBench, VBench++ and their neighbours: constants, suites, rules, formulas. Networks are in `mmalign.backbones`."""
