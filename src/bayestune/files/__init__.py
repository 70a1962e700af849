"""Write files and folders whole or not at all; locks, hashes, strict JSON, and disk errors."""

from bayestune.files.disk import appending as appending
from bayestune.files.disk import check_writable as check_writable
from bayestune.files.disk import file_record as file_record
from bayestune.files.disk import file_sha256 as file_sha256
from bayestune.files.disk import flush as flush
from bayestune.files.disk import replacing as replacing
from bayestune.files.disk import write_text as write_text
from bayestune.files.disk import writing as writing
from bayestune.files.folders import MANIFEST as MANIFEST
from bayestune.files.folders import alone as alone
from bayestune.files.folders import claimed as claimed
from bayestune.files.folders import existing_folder as existing_folder
from bayestune.files.folders import new_folder as new_folder
from bayestune.files.folders import publish as publish
from bayestune.files.folders import remove as remove
from bayestune.files.folders import replaced_if as replaced_if
from bayestune.files.json_files import read_json as read_json
from bayestune.files.json_files import read_sealed as read_sealed
from bayestune.files.json_files import sealed as sealed
from bayestune.files.json_files import strict_json as strict_json
from bayestune.files.json_files import write_json as write_json
