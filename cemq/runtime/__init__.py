"""Running a pipeline under a schedule."""

from cemq.runtime.attach import (
    ScheduleHook,
    apply_policy,
    attach,
    attached,
    detach,
    find_hook,
    for_request,
    schedule_hook,
    set_budget,
)
from cemq.runtime.cached.caches import CacheMemory, cache_checked

__all__ = [
    "CacheMemory",
    "ScheduleHook",
    "apply_policy",
    "attach",
    "attached",
    "cache_checked",
    "detach",
    "find_hook",
    "for_request",
    "schedule_hook",
    "set_budget",
]
