"""A program that its compiler cannot write down is a row without its contents."""

import jax

from jaxmp.report import StepReport
from jaxmp.report._rows import read_answer
from jaxmp.report.compile._programs import Program
from jaxmp.report.compile._worker import Answer, program_text
from jaxmp.report.compile.targets import read_target


class Unwritten:
    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")


def test_a_program_that_cannot_be_written_down_has_memory_and_traffic():
    answer = Answer(
        {"argument": 4, "temp": 3, "output": 5, "alias": 4, "generated_code": 0},
        {"bytes accessed": 9.0},
        program_text(Unwritten()),
        1.5,
    )
    program = Program(read_target("tpu-v6e"), b"", False, (), (), ())
    row = read_answer("float32", program, answer)
    assert (row.peak, row.accessed, row.fits) == (8, 9.0, True)
    assert (row.contents, row.roofline, row.buffers, row.explained) == (
        None,
        None,
        (),
        None,
    )
    assert "float32 on tpu-v6e" in str(StepReport((row,)))
    assert "cannot write the program down" in str(StepReport((row,)))
    assert "null" in StepReport((row,)).to_json()
