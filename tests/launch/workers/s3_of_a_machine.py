"""An S3 server at an address, which lists what it answers: address that asked, method, path, bytes.

python -m tests.launch.workers.s3_of_a_machine ADDRESS PORT BUCKET LOG
"""

import sys
import threading
from pathlib import Path
from typing import Any

from tests.object_storage import answers_noted, start_server


def main(address: str, given_port: str, bucket: str, log: str) -> None:
    """Serve until killed; the log is there once the bucket is."""
    import boto3

    host, port = start_server(int(given_port), address)
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=bucket)
    lock = threading.Lock()

    def note(environ: dict[str, Any], num_bytes: int) -> None:
        asked = (environ["REMOTE_ADDR"], environ["REQUEST_METHOD"], environ["PATH_INFO"])
        with lock, Path(log).open("a") as file:
            print(*asked, num_bytes, file=file)

    with answers_noted(port, note):
        Path(log).touch()
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
