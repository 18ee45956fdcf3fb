"""The S3 server's memory, which tests read instead of asking for each object."""

from __future__ import annotations

import hashlib
import threading
import time

from tests.fakes.s3_server import BUCKET, S3Server

# More than moto keeps in memory by default.
SIZE = 6 << 20


def test_contents_are_read_while_objects_are_replaced_and_deleted() -> None:
    over = threading.Event()
    values: set[bytes] = set()

    def read() -> None:
        while not over.is_set():
            values.update(server.contents().values())
            time.sleep(0.001)

    with S3Server() as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        reader = threading.Thread(target=read)
        reader.start()
        bodies = [bytes([number]) * SIZE for number in range(16)]
        tags = []
        for number, body in enumerate(bodies):
            tags.append(client.put_object(Bucket=BUCKET, Key="file", Body=body)["ETag"].strip('"'))
            if number % 5 == 4:
                client.delete_object(Bucket=BUCKET, Key="file")
        over.set()
        reader.join()
        client.close()
    assert tags == [hashlib.md5(body).hexdigest() for body in bodies]
    assert values <= set(bodies)
    assert len(values) > 3
