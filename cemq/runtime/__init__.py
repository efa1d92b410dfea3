"""Running a pipeline under a schedule."""

from cemq.runtime.apply import apply_schedule
from cemq.runtime.caches import CacheMemory, cache_checked
from cemq.runtime.hook import (
    ScheduleHook,
    attach,
    attached,
    detach,
    find_hook,
    for_request,
    schedule_hook,
    set_budget,
)
from cemq.runtime.load import from_pretrained
from cemq.runtime.plan import Plan

__all__ = [
    "CacheMemory",
    "Plan",
    "ScheduleHook",
    "apply_schedule",
    "attach",
    "attached",
    "cache_checked",
    "detach",
    "find_hook",
    "for_request",
    "from_pretrained",
    "schedule_hook",
    "set_budget",
]
