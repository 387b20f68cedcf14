"""Ten lines that say what to compare.

Run: spectraformer sweep examples/sweep.py
"""

from spectraformer.config import AttentionConfig, Run, replace
from spectraformer.tasks import default_run


def runs() -> list[Run]:
    """How much do more random features help? Seeds come last in value: the first compares all."""
    features = [AttentionConfig(name="oprf-orf", num_features=m) for m in (32, 64, 128)]
    attentions = [AttentionConfig(name="softmax"), *features]
    plan = [default_run("listops", size="tiny", attention=attention) for attention in attentions]
    return [replace(run, {"train.seed": seed}) for seed in range(3) for run in plan]
