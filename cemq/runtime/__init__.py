"""Running a pipeline under a schedule."""

from cemq.runtime.apply import apply_schedule
from cemq.runtime.hook import ScheduleHook, attach, attached, detach, schedule_hook
from cemq.runtime.load import from_pretrained

__all__ = ["ScheduleHook", "apply_schedule", "attach", "attached", "detach", "from_pretrained", "schedule_hook"]
