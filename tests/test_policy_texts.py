"""Policies as they are written on the command line and kept in a bundle, whatever each of them decides by."""

import pytest

from cemq.errors import InputError
from cemq.runtime.dicache import DiCache
from cemq.runtime.duca import DuCa
from cemq.runtime.easycache import EasyCache
from cemq.runtime.h2cache import H2Cache
from cemq.runtime.magcache import MagCache
from cemq.runtime.policy_names import describe_policy, make_policy, parse_policy
from cemq.runtime.precisecache import PreciseCache
from cemq.runtime.sencache import SenCache
from cemq.runtime.teacache import TeaCache


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("teacache:threshold=0.2,coefficients=3.0;1.5;0,cache=output",
         TeaCache(threshold=0.2, coefficients=(3.0, 1.5, 0.0), cache="output")),
        ("magcache:threshold=0.06,magnitudes=1;1.2;0.9,most_skipped=4,retention=0.1",
         MagCache(threshold=0.06, magnitudes=(1.0, 1.2, 0.9), most_skipped=4, retention=0.1)),
        ("easycache:threshold=0.05,warm_up=10", EasyCache(threshold=0.05, warm_up=10)),
        ("dicache:threshold=0.4,blocks=2,most_aligned=2,cache=output",
         DiCache(threshold=0.4, blocks=2, most_aligned=2, cache="output")),
        ("precisecache:threshold=0.5,shrink=2,shrink_frames=1,radius=0.1",
         PreciseCache(threshold=0.5, shrink=2, shrink_frames=1, radius=0.1)),
        ("sencache:threshold=0.1,timesteps=900;100,to_sample=0.5;1,to_timestep=0;0.01,early_threshold=0",
         SenCache(threshold=0.1, timesteps=(900, 100), to_sample=(0.5, 1), to_timestep=(0, 0.01), early_threshold=0)),
        ("duca:interval=3,fresh=0.1,age_weight=0.5,seed=2", DuCa(interval=3, fresh=0.1, age_weight=0.5, seed=2)),
        ("h2-cache:threshold=0.1,detail_threshold=0.2,structure_blocks=4",
         H2Cache(threshold=0.1, detail_threshold=0.2, structure_blocks=4)),
    ],
)  # fmt: skip
def test_a_policy_is_made_again_of_what_describes_it(text, policy):
    assert parse_policy(text) == policy
    assert make_policy(**describe_policy(policy)) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teecache:threshold=1", "unknown policy 'teecache'.*did you mean 'teacache'"),
        ("teacache:treshold=1", "unknown setting of policy teacache 'treshold'.*did you mean 'threshold'"),
        ("teacache:threshold", "write NAME:KEY=VALUE"),
        ("teacache", "policy teacache needs threshold: write teacache:threshold="),
        ("teacache:threshold=-1", "threshold=-1: choose 0 or more"),
        ("teacache:threshold=much", "threshold=much: choose 0 or more"),
        ("teacache:threshold=1,coefficients=one", "give numbers, highest power first"),
        ("", "unknown policy ''"),
        ("magcache:threshold=1", "policy magcache needs magnitudes"),
        ("magcache:threshold=-1,magnitudes=1", "magcache: threshold=-1: choose 0 or more"),
        ("magcache:threshold=1,magnitudes=1;0", "magcache: magnitudes: give a number above 0 for every step"),
        ("magcache:threshold=1,magnitudes=1,most_skipped=1.5", "most_skipped=1.5: choose a whole number, 0 or more"),
        ("magcache:threshold=1,magnitudes=1,retention=2", "magcache: retention=2: choose 0 to 1"),
        ("easycache:threshold=much", "easycache: threshold=much: choose 0 or more"),
        ("easycache:threshold=1,warm_up=-1", "warm_up=-1: choose a whole number, 0 or more"),
        ("dicache:threshold=1,blocks=0", "dicache: blocks=0: choose a whole number, 1 or more"),
        ("dicache:threshold=1,retention=some", "dicache: retention=some: choose 0 to 1"),
        ("dicache:threshold=1,most_aligned=0.5", "dicache: most_aligned=0.5: choose 1 or more"),
        ("precisecache:threshold=-1", "precisecache: threshold=-1: choose 0 or more"),
        ("precisecache:threshold=1,shrink=0", "precisecache: shrink=0: choose a whole number, 1 or more"),
        ("precisecache:threshold=1,radius=2", "precisecache: radius=2: choose 0 to 1"),
        ("precisecache:threshold=1,cache=residual", "precisecache: cache=residual: it reuses the output"),
        ("sencache:threshold=1,timesteps=1,to_sample=1;2,to_timestep=1", "give as many numbers for each"),
        ("sencache:threshold=1,timesteps=1,to_sample=-1,to_timestep=1", "to_sample, to_timestep: choose 0 or more"),
        ("sencache:threshold=1,timesteps=a,to_sample=1,to_timestep=1", "timesteps: give a number for every timestep"),
        ("sencache:threshold=1,timesteps=1,to_sample=1,to_timestep=1,early_threshold=-1", "early_threshold=-1: choose"),
        ("duca:fresh=0.1", "policy duca needs interval"),
        ("duca:interval=0", "duca: interval=0: choose a whole number, 1 or more"),
        ("duca:interval=2,fresh=2", "duca: fresh=2: choose 0 to 1"),
        ("duca:interval=2,age_weight=-1", "duca: age_weight=-1: choose 0 or more"),
        ("duca:interval=2,seed=-1", "duca: seed=-1: choose a whole number, 0 or more"),
        ("duca:interval=2,cache=output", "duca: cache=output: it answers blocks itself"),
        ("h2-cache:threshold=-1", "h2-cache: threshold=-1: choose 0 or more"),
        ("h2-cache:threshold=1,detail_threshold=x", "h2-cache: detail_threshold=x: choose 0 or more"),
        ("h2-cache:threshold=1,structure_blocks=0.5", "structure_blocks=0.5: choose a whole number, 0 or more"),
        ("h2-cache:threshold=1,cache=modules", "h2-cache: cache=modules: it answers blocks itself"),
    ],
)
def test_a_policy_that_is_none_is_one_line(text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_policy(text)
    assert len(str(caught.value).splitlines()) == 1
