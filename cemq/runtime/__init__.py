"""Running a pipeline under a schedule."""

from cemq.runtime.hook import ScheduleHook, attach, attached, detach, schedule_hook
from cemq.runtime.load import from_pretrained

__all__ = ["ScheduleHook", "attach", "attached", "detach", "from_pretrained", "schedule_hook"]
