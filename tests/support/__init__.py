"""What test files share; none takes anything from another (`test_rooms.py` holds that).

- `families`: a tiny pipeline of every family; `checks`: what must hold for each.
- `pipelines`: the two tiny pipelines that most tests run, and how they run them; `models`: smaller than a pipeline.
- `schedules`, `priors`, `planning`: what is attached to them, measured of them, and searched for on them.
- `slow`: which cases of a test every run tries.
- `loras`: LoRA files for them; `counting`: what runs of them take.
- `callbacks`: what ``callback_on_step_end`` may do to a run.
- `quantized`, `bundles`: what is asked of a quantized model, and what is done to saved ones.
- `browser`: a headless Chromium, for pages that run scripts.
- `comparing`: models and tensors; `processes`: fresh interpreters, and what they share with a test.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
