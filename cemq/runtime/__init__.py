"""Running a pipeline under a schedule."""

from cemq.runtime.apply import apply_schedule
from cemq.runtime.hook import ScheduleHook, attach, attached, detach, schedule_hook, set_budget
from cemq.runtime.load import from_pretrained
from cemq.runtime.plan import Plan
from cemq.runtime.residual import residual_checked

__all__ = [
    "Plan",
    "ScheduleHook",
    "apply_schedule",
    "attach",
    "attached",
    "detach",
    "from_pretrained",
    "residual_checked",
    "schedule_hook",
    "set_budget",
]
