"""Airflow: a run each 30 minutes. Exit 3 (another job holds the store) skips; any other is a failure, tried again."""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    "dynams_rescore",
    schedule=timedelta(minutes=30),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
):
    BashOperator(
        task_id="rescore",
        bash_command="dynams rescore --config run.toml --checkpoint ckpt/ --json",
        cwd="/srv/training",
        skip_on_exit_code=3,
        execution_timeout=timedelta(hours=6),
    )
