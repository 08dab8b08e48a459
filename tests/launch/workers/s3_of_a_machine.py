"""An S3 server at an address, which lists what it answers: address that asked, method, key, bytes.

python -m tests.launch.workers.s3_of_a_machine ADDRESS PORT BUCKET LOG
"""

import sys
import threading
from pathlib import Path


def main(address: str, port: str, bucket: str, log: str) -> None:
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=address, port=int(port), verbose=False)
    server.start()
    host, found = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{found}").create_bucket(Bucket=bucket)
    real, lock = server._server.app, threading.Lock()
    Path(log).touch()

    def counting(environ, start_response):
        parts = list(real(environ, start_response))
        taken = int(environ.get("CONTENT_LENGTH") or 0)
        with lock, Path(log).open("a") as file:
            print(
                environ["REMOTE_ADDR"], environ["REQUEST_METHOD"], environ["PATH_INFO"],
                taken, sum(map(len, parts)), file=file,
            )  # fmt: skip
        return parts

    server._server.app = counting
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
