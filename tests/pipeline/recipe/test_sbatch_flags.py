import pytest

from pipeline.recipe.sbatch_flags import excluded_nodes
from pipeline.recipe.sections import JobResources


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("nodelist=a", "'nodelist=a' is not an option of sbatch"),
        ("--", "'--' is not an option of sbatch"),
        ("--partition=gpu", "'--partition=gpu' is not given as a flag; set resources.partition"),
        ("-t1:00", "'-t1:00' is not given as a flag; set resources.time_limit"),
        ("--wrap=true", "'--wrap=true' cannot be given: the program sets --wrap itself"),
        ("--exp=NONE", "'--exp=NONE' cannot be given: the program sets --export itself"),
        ("--open-mode=truncate", "the program sets --open-mode itself"),
        ("-Jname", "the program sets --job-name itself"),
        ("-o", "the program sets --output itself"),
        ("--chdir=/", "the program sets --chdir itself"),
        ("--no-requeue", "the program sets --no-requeue itself"),
        ("--chd=/", "the program sets --chdir itself"),
        ("--workdir=/", "the program sets --workdir itself"),
        ("--export=", "the program sets --export itself"),
        ("--wra=true", "the program sets --wrap itself"),
        ("-D/", "the program sets --chdir itself"),
        ("-HD/", "the program sets --chdir itself"),
        ("-sHo/home/x/.bashrc", "the program sets --output itself"),
        ("-vvW", "the program sets --wait itself"),
        ("--tasks-per-node=2", "'--tasks-per-node=2' is not given as a flag; set resources.ranks"),
        ("-hx", "with --help, nothing is submitted"),
        # The word behind the flags is the batch script: sbatch would run what comes after it, which is from a recipe.
        ("-x", "'-x' would take the next word for its value; write it as one word: -xVALUE"),
        ("-Hx", "'-Hx' would take the next word for its value"),
        ("--comment", "'--comment' would take the next word for its value; write --comment=VALUE"),
        ("--nodel", "'--nodel' would take the next word for its value"),
    ],
)
def test_options_that_the_program_gives_are_refused_as_flags(flag: str, message: str) -> None:
    with pytest.raises(ValueError, match="flags") as caught:
        JobResources(flags=(flag,))
    assert message in str(caught.value)


def test_other_options_of_sbatch_are_accepted() -> None:
    flags = (
        "--exclusive",
        "--nodelist=node[1-4]",
        "-xnode5",
        "--hold",
        "-s",
        "-Hwnode[D-o]",
        "--verb",
        "--mem-per-gpu=80G",
        "--gres=nvme:1",
        "--nice=5",
    )
    assert JobResources(flags=flags).flags == flags


@pytest.mark.parametrize(
    ("flags", "nodes"),
    [
        ((), ""),
        (("--exclusive", "--exclusive=user", "--nodelist=node1"), ""),
        (("--exclude=node[1-2],node5",), "node[1-2],node5"),
        (("--exclud=node1",), "node1"),
        (("-xnode1",), "node1"),
        (("-sHxnode1",), "node1"),
        (("-wnodex", "-sxnode1"), "node1"),
        (("--exclude=node1", "-xnode2"), "node2"),
        (("-xnode2", "--exclude=/shared/bad"), "/shared/bad"),
    ],
)
def test_the_nodes_that_a_person_excludes_are_found_in_every_spelling(flags: tuple[str, ...], nodes: str) -> None:
    assert excluded_nodes(JobResources(flags=flags).flags) == nodes
