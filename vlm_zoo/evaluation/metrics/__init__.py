"""The zoo's metrics: one folder, one script, one `evaluate.Metric` each, loaded by path and without a network.

```python
from vlm_zoo.evaluation import metrics

metrics.load("pope").compute(predictions=["No, I see none."], references=["no"])
```

`evaluate.load("<folder of this package>/pope")` opens the same file.
"""

from importlib import resources

import evaluate


METRICS = ("exact_match", "pope", "vqa_accuracy")


def load(name: str, config_name: str | None = None, **kwargs) -> evaluate.Metric:
    """Loads one of `METRICS` from this package's own files; further arguments go to `evaluate.load`."""
    if name not in METRICS:
        raise ValueError(f"Unknown metric {name!r}: the zoo ships {', '.join(METRICS)}.")
    with resources.as_file(resources.files(__name__).joinpath(name, f"{name}.py")) as script:
        return evaluate.load(str(script), config_name, **kwargs)
