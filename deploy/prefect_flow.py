"""Prefect: a run each 30 minutes: `python deploy/prefect_flow.py`. Exit 3, another job at work, is no failure."""

import json
import subprocess

from prefect import flow, get_run_logger, task

BUSY = 3


@task(retries=2, retry_delay_seconds=300)
def rescore() -> dict | None:
    """The round of the newest checkpoint; None while another job is at work."""
    command = ["dynams", "rescore", "--config", "run.toml", "--checkpoint", "ckpt/", "--json"]
    done = subprocess.run(command, cwd="/srv/training", capture_output=True, text=True)
    if done.returncode == BUSY:
        get_run_logger().info(done.stderr)
        return None
    if done.returncode:
        raise RuntimeError(f"dynams rescore exited {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


@flow(name="dynams-rescore")
def make_round() -> dict | None:
    """One round."""
    return rescore()


if __name__ == "__main__":
    make_round.serve(name="dynams-rescore", interval=1800)
