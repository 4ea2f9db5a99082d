"""Rounds of steps, timed by a clock that the steps themselves let run."""

import pytest
import rounds


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rounds_are_timed_by_the_step():
    clock = Clock()

    def start():
        clock.now += 0.25

    def wait():
        clock.now += 2.0

    found = rounds.measured(start, wait, rounds=3, steps=4, clock=clock)
    assert found == {"ms": [750.0] * 3, "host_ms": 250.0, "steps": 4}


@pytest.mark.parametrize(("seconds", "expected"), [(10.0, 2), (0.125, 4)])
def test_short_steps_are_warmed_up_for_a_while(seconds, expected):
    clock, started = Clock(), []

    def wait():
        clock.now += seconds

    rounds.warm_up(lambda: started.append(1), wait, clock=clock)
    assert len(started) == expected
