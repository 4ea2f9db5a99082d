"""The schedule of timings, with processes that only let a clock run."""

from machine_programs import Case
from machine_schedule import Schedule


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Process:
    """Works while others do; answers so many seconds after it began or may go on."""

    def __init__(self, events, clock, label, answers):
        self.events, self.clock, self.label = events, clock, label
        self.answers, self.began = list(answers), clock.now

    def answer(self, seconds):
        takes, answer = self.answers.pop(0)
        due = max(self.began + takes, self.clock.now)
        if due > self.clock.now + max(seconds, 0.0):
            self.clock.now += max(seconds, 0.0)
            raise TimeoutError
        self.clock.now = due
        return answer

    def go(self):
        self.events.append(f"go {self.label}")
        self.began = self.clock.now

    def end(self):
        if f"end {self.label}" not in self.events:
            self.events.append(f"end {self.label}")


READY, TIMED = {"ready": True}, {"ms": [1]}
PLANNED = {"planned": 7}
ANSWERS = {"compile": [(10, PLANNED)], "time": [(1, READY), (2, TIMED)]}


class Machines:
    """Runs a schedule of cases `a`, `b`, ... whose answers are given."""

    def __init__(self, compilers=None, timers=None):
        self.clock, self.events, self.saved = Clock(), [], {}
        self.compilers, self.timers = compilers or {}, timers or {}

    def launch(self, role, case):
        self.events.append(f"start {role} {case.way}")
        given = (self.compilers if role == "compile" else self.timers).get(case.way)
        usual = {
            "compile": [(10, {"planned": 7})],
            "time": [(1, READY), (2, {"ms": [1]})],
        }
        return Process(
            self.events, self.clock, f"{role} {case.way}", given or usual[role]
        )

    def run(self, names, seconds, at_once=2):
        schedule = Schedule(
            self.launch,
            lambda case, facts: self.saved.update({case.way: facts}),
            seconds=seconds,
            at_once=at_once,
            clock=self.clock,
        )
        return [case.way for case in schedule.run(Case("m", name) for name in names)]


ANSWERED = {**PLANNED, **READY, **TIMED}


def test_a_wave_compiles_at_once_and_is_timed_one_by_one_when_all_have_compiled():
    machines = Machines()
    assert machines.run("abc", seconds=1000) == []
    assert machines.saved == dict.fromkeys("abc", ANSWERED)
    assert machines.events[:10] == [
        *("start compile a", "start time a", "start compile b", "start time b"),
        *("end compile a", "end compile b"),
        *("go time a", "end time a", "go time b", "end time b"),
    ]


def test_what_does_not_fit_is_not_begun():
    machines = Machines()
    # A wave of two takes 14 seconds.
    assert machines.run("abcd", seconds=27) == ["c", "d"]
    assert set(machines.saved) == {"a", "b"}
    assert not any(event.endswith(("c", "d")) for event in machines.events)
    assert Machines().run("abcd", seconds=35) == []
    # Nothing is known of the first wave.
    assert Machines().run("ab", seconds=19) == ["a", "b"]


def test_a_compiler_that_takes_too_long_leaves_time_for_the_others():
    machines = Machines(compilers={"a": [(500, {})]})
    assert machines.run("ab", seconds=60) == ["a"]
    assert machines.saved == {"b": ANSWERED}
    assert machines.events.index("end time a") < machines.events.index("go time b")
    assert machines.clock.now <= 160


def test_what_crashes_is_a_row_and_its_other_process_does_not_disturb():
    crashed = {"error": "ended with status -9"}
    machines = Machines(
        compilers={"a": [(3, crashed)]}, timers={"b": [(1, READY), (1, crashed)]}
    )
    assert machines.run("abc", seconds=1000, at_once=3) == []
    assert machines.saved["a"] == crashed
    assert machines.saved["b"]["error"] == crashed["error"]
    assert machines.saved["c"] == ANSWERED
    assert machines.events.index("end time a") < machines.events.index("go time b")


def test_a_step_that_hangs_is_not_taken_and_ended():
    machines = Machines(timers={"a": [(1, READY), (900, {})]})
    assert machines.run("a", seconds=100) == ["a"]
    assert machines.saved == {}
    assert machines.events[-1] == "end time a"
