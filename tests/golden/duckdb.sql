-- a stage: a device's rows in an interval, where nobody is known
CREATE TEMPORARY TABLE recognition_stage_030cbb4e AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP) AS start_0, CAST(NULL AS TIMESTAMP) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.context_traits_email AS value_0, events.user_id AS value_1 
FROM events 
WHERE 1 = 0;
INSERT INTO recognition_stage_030cbb4e SELECT c0, c1, c2, c3, c4, c5, CAST(make_timestamp(c6) AS TIMESTAMP), CAST(make_timestamp(c7) AS TIMESTAMP), c8, c9, c10, c11 FROM recognition_rows;
SELECT recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_030cbb4e JOIN recognition_ledger ON recognition_ledger.table_name = ? AND recognition_ledger.key_column = ? AND recognition_ledger.key_value = recognition_stage_030cbb4e.equal_0 AND recognition_ledger.workspace = recognition_stage_030cbb4e.workspace AND recognition_ledger.sequence >= recognition_stage_030cbb4e.sequence ORDER BY recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
UPDATE events SET user_id=recognition_stage_030cbb4e.value_1, context_traits_email=recognition_stage_030cbb4e.value_0 FROM recognition_stage_030cbb4e WHERE events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.user_id IS NULL AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT));
SELECT recognition_stage_030cbb4e.update_id, count(*) AS rows 
FROM recognition_stage_030cbb4e JOIN events ON events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.context_traits_email IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_0 AND events.user_id IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_1 AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT)) GROUP BY recognition_stage_030cbb4e.update_id;
INSERT INTO recognition_ledger (update_id, workspace, table_name, key_column, key_value, message_column, message_id, extras, columns, empty, time_column, starts, ends, sequence, applied_at) SELECT recognition_stage_030cbb4e.update_id, recognition_stage_030cbb4e.workspace, CAST(? AS TEXT) AS anon_1, CAST(? AS TEXT) AS anon_2, recognition_stage_030cbb4e.equal_0, CAST(? AS TEXT) AS anon_3, CAST(? AS TEXT) AS anon_4, recognition_stage_030cbb4e.extras, CAST(? AS TEXT) AS anon_5, CAST(? AS TEXT) AS anon_6, CAST(? AS TEXT) AS anon_7, recognition_stage_030cbb4e.starts_0, recognition_stage_030cbb4e.ends_0, recognition_stage_030cbb4e.sequence, CAST(? AS BIGINT) AS anon_8 
FROM recognition_stage_030cbb4e 
WHERE recognition_stage_030cbb4e.extras IS NOT NULL;
DROP TABLE recognition_stage_030cbb4e;
COMMIT;

-- a stage: the same, in a table with versions
CREATE TEMPORARY TABLE recognition_stage_25c95e93 AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP) AS start_0, CAST(NULL AS TIMESTAMP) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.context_traits_email AS value_0, events.user_id AS value_2 
FROM events 
WHERE 1 = 0;
INSERT INTO recognition_stage_25c95e93 SELECT c0, c1, c2, CAST(make_timestamp(c3) AS TIMESTAMP), CAST(make_timestamp(c4) AS TIMESTAMP), c5, c6, c7, c8 FROM recognition_rows;
UPDATE events SET user_id=recognition_stage_25c95e93.value_2, context_traits_email=recognition_stage_25c95e93.value_0, recognition_version=recognition_stage_25c95e93.sequence FROM recognition_stage_25c95e93 WHERE events.anonymous_id = recognition_stage_25c95e93.equal_0 AND events.timestamp >= recognition_stage_25c95e93.start_0 AND events.timestamp < recognition_stage_25c95e93.end_0 AND (events.recognition_version IS NULL OR events.recognition_version < recognition_stage_25c95e93.sequence OR events.recognition_version = recognition_stage_25c95e93.sequence AND (events.context_traits_email IS DISTINCT FROM recognition_stage_25c95e93.value_0 OR events.user_id IS DISTINCT FROM recognition_stage_25c95e93.value_2)) AND (events.user_id IS NULL OR events.recognition_version IS NOT NULL) AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT));
SELECT recognition_stage_25c95e93.update_id, count(*) AS rows 
FROM recognition_stage_25c95e93 JOIN events ON events.anonymous_id = recognition_stage_25c95e93.equal_0 AND events.timestamp >= recognition_stage_25c95e93.start_0 AND events.timestamp < recognition_stage_25c95e93.end_0 AND events.recognition_version >= recognition_stage_25c95e93.sequence AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT)) GROUP BY recognition_stage_25c95e93.update_id;
DROP TABLE recognition_stage_25c95e93;
COMMIT;

-- a stage: a column of recognition's own, set whatever it holds
CREATE TEMPORARY TABLE recognition_stage_41e62109 AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, events.stitched_user_id AS value_0 
FROM events 
WHERE 1 = 0;
INSERT INTO recognition_stage_41e62109 SELECT c0, c1, c2, c3, c4, c5, c6 FROM recognition_rows;
SELECT recognition_stage_41e62109.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_41e62109 JOIN recognition_ledger ON recognition_ledger.table_name = ? AND recognition_ledger.key_column = ? AND recognition_ledger.key_value = recognition_stage_41e62109.equal_0 AND recognition_ledger.workspace = recognition_stage_41e62109.workspace AND recognition_ledger.sequence >= recognition_stage_41e62109.sequence ORDER BY recognition_stage_41e62109.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
UPDATE events SET stitched_user_id=recognition_stage_41e62109.value_0 FROM recognition_stage_41e62109 WHERE events.anonymous_id = recognition_stage_41e62109.equal_0 AND events.stitched_user_id IS DISTINCT FROM recognition_stage_41e62109.value_0;
SELECT recognition_stage_41e62109.update_id, count(*) AS rows 
FROM recognition_stage_41e62109 JOIN events ON events.anonymous_id = recognition_stage_41e62109.equal_0 AND events.stitched_user_id IS NOT DISTINCT FROM recognition_stage_41e62109.value_0 GROUP BY recognition_stage_41e62109.update_id;
INSERT INTO recognition_ledger (update_id, workspace, table_name, key_column, key_value, message_column, message_id, extras, columns, empty, time_column, starts, ends, sequence, applied_at) SELECT recognition_stage_41e62109.update_id, recognition_stage_41e62109.workspace, CAST(? AS TEXT) AS anon_1, CAST(? AS TEXT) AS anon_2, recognition_stage_41e62109.equal_0, CAST(? AS TEXT) AS anon_3, CAST(? AS TEXT) AS anon_4, recognition_stage_41e62109.extras, CAST(? AS TEXT) AS anon_5, CAST(? AS TEXT) AS anon_6, CAST(? AS TEXT) AS anon_7, CAST(NULL AS BIGINT) AS anon_8, CAST(NULL AS BIGINT) AS anon__1, recognition_stage_41e62109.sequence, CAST(? AS BIGINT) AS anon_9 
FROM recognition_stage_41e62109 
WHERE recognition_stage_41e62109.extras IS NOT NULL;
DROP TABLE recognition_stage_41e62109;
COMMIT;

-- a stage: messages of a device
CREATE TEMPORARY TABLE recognition_stage_f0271362 AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, events.message_id AS equal_1, events.stitched_user_id AS value_0 
FROM events 
WHERE 1 = 0;
INSERT INTO recognition_stage_f0271362 SELECT c0, c1, c2, c3, c4, c5, c6, c7 FROM recognition_rows;
SELECT recognition_stage_f0271362.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_f0271362 JOIN recognition_ledger ON recognition_ledger.table_name = ? AND recognition_ledger.key_column = ? AND recognition_ledger.key_value = recognition_stage_f0271362.equal_0 AND recognition_ledger.workspace = recognition_stage_f0271362.workspace AND recognition_ledger.sequence >= recognition_stage_f0271362.sequence ORDER BY recognition_stage_f0271362.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
UPDATE events SET stitched_user_id=recognition_stage_f0271362.value_0 FROM recognition_stage_f0271362 WHERE events.anonymous_id = recognition_stage_f0271362.equal_0 AND events.message_id = recognition_stage_f0271362.equal_1 AND events.stitched_user_id IS DISTINCT FROM recognition_stage_f0271362.value_0 AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT));
SELECT recognition_stage_f0271362.update_id, count(*) AS rows 
FROM recognition_stage_f0271362 JOIN events ON events.anonymous_id = recognition_stage_f0271362.equal_0 AND events.message_id = recognition_stage_f0271362.equal_1 AND events.stitched_user_id IS NOT DISTINCT FROM recognition_stage_f0271362.value_0 AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT)) GROUP BY recognition_stage_f0271362.update_id;
INSERT INTO recognition_ledger (update_id, workspace, table_name, key_column, key_value, message_column, message_id, extras, columns, empty, time_column, starts, ends, sequence, applied_at) SELECT recognition_stage_f0271362.update_id, recognition_stage_f0271362.workspace, CAST(? AS TEXT) AS anon_1, CAST(? AS TEXT) AS anon_2, recognition_stage_f0271362.equal_0, CAST(? AS TEXT) AS anon_3, recognition_stage_f0271362.equal_1, recognition_stage_f0271362.extras, CAST(? AS TEXT) AS anon_4, CAST(? AS TEXT) AS anon_5, CAST(? AS TEXT) AS anon_6, CAST(NULL AS BIGINT) AS anon_7, CAST(NULL AS BIGINT) AS anon__1, recognition_stage_f0271362.sequence, CAST(? AS BIGINT) AS anon_8 
FROM recognition_stage_f0271362 
WHERE recognition_stage_f0271362.extras IS NOT NULL;
DROP TABLE recognition_stage_f0271362;
COMMIT;

-- a stage: a device's interval, of which a later update named messages
CREATE TEMPORARY TABLE recognition_stage_e8cba12a AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP) AS start_0, CAST(NULL AS TIMESTAMP) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.stitched_user_id AS value_0 
FROM events 
WHERE 1 = 0;
INSERT INTO recognition_stage_e8cba12a SELECT c0, c1, c2, c3, c4, c5, CAST(make_timestamp(c6) AS TIMESTAMP), CAST(make_timestamp(c7) AS TIMESTAMP), c8, c9, c10 FROM recognition_rows;
SELECT recognition_stage_e8cba12a.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_e8cba12a JOIN recognition_ledger ON recognition_ledger.table_name = ? AND recognition_ledger.key_column = ? AND recognition_ledger.key_value = recognition_stage_e8cba12a.equal_0 AND recognition_ledger.workspace = recognition_stage_e8cba12a.workspace AND recognition_ledger.sequence >= recognition_stage_e8cba12a.sequence ORDER BY recognition_stage_e8cba12a.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
CREATE TEMPORARY TABLE recognition_stage_e8cba12a_1 AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP) AS start_0, CAST(NULL AS TIMESTAMP) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.stitched_user_id AS value_0 
FROM events 
WHERE 1 = 0;
INSERT INTO recognition_stage_e8cba12a_1 SELECT c0, c1, c2, c3, c4, c5, CAST(make_timestamp(c6) AS TIMESTAMP), CAST(make_timestamp(c7) AS TIMESTAMP), c8, c9, c10 FROM recognition_rows;
UPDATE events SET stitched_user_id=recognition_stage_e8cba12a_1.value_0 FROM recognition_stage_e8cba12a_1 WHERE events.anonymous_id = recognition_stage_e8cba12a_1.equal_0 AND events.timestamp >= recognition_stage_e8cba12a_1.start_0 AND events.timestamp < recognition_stage_e8cba12a_1.end_0 AND events.stitched_user_id IS DISTINCT FROM recognition_stage_e8cba12a_1.value_0 AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT)) AND NOT (EXISTS (SELECT 1 
FROM recognition_ledger 
WHERE recognition_ledger.table_name = ? AND recognition_ledger.key_column = ? AND recognition_ledger.key_value = recognition_stage_e8cba12a_1.equal_0 AND recognition_ledger.workspace = recognition_stage_e8cba12a_1.workspace AND recognition_ledger.message_column = ? AND recognition_ledger.columns = ? AND recognition_ledger.extras = ? AND (recognition_ledger.sequence > recognition_stage_e8cba12a_1.sequence OR recognition_ledger.sequence = recognition_stage_e8cba12a_1.sequence AND recognition_ledger.update_id > recognition_stage_e8cba12a_1.update_id) AND recognition_ledger.message_id = events.message_id));
SELECT recognition_stage_e8cba12a_1.update_id, count(*) AS rows 
FROM recognition_stage_e8cba12a_1 JOIN events ON events.anonymous_id = recognition_stage_e8cba12a_1.equal_0 AND events.timestamp >= recognition_stage_e8cba12a_1.start_0 AND events.timestamp < recognition_stage_e8cba12a_1.end_0 AND events.stitched_user_id IS NOT DISTINCT FROM recognition_stage_e8cba12a_1.value_0 AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT)) GROUP BY recognition_stage_e8cba12a_1.update_id;
INSERT INTO recognition_ledger (update_id, workspace, table_name, key_column, key_value, message_column, message_id, extras, columns, empty, time_column, starts, ends, sequence, applied_at) SELECT recognition_stage_e8cba12a_1.update_id, recognition_stage_e8cba12a_1.workspace, CAST(? AS TEXT) AS anon_1, CAST(? AS TEXT) AS anon_2, recognition_stage_e8cba12a_1.equal_0, CAST(? AS TEXT) AS anon_3, CAST(? AS TEXT) AS anon_4, recognition_stage_e8cba12a_1.extras, CAST(? AS TEXT) AS anon_5, CAST(? AS TEXT) AS anon_6, CAST(? AS TEXT) AS anon_7, recognition_stage_e8cba12a_1.starts_0, recognition_stage_e8cba12a_1.ends_0, recognition_stage_e8cba12a_1.sequence, CAST(? AS BIGINT) AS anon_8 
FROM recognition_stage_e8cba12a_1 
WHERE recognition_stage_e8cba12a_1.extras IS NOT NULL;
DROP TABLE recognition_stage_e8cba12a;
DROP TABLE recognition_stage_e8cba12a_1;
COMMIT;

-- a stage: the first one again, which changes nothing
CREATE TEMPORARY TABLE recognition_stage_030cbb4e AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP) AS start_0, CAST(NULL AS TIMESTAMP) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.context_traits_email AS value_0, events.user_id AS value_1 
FROM events 
WHERE 1 = 0;
INSERT INTO recognition_stage_030cbb4e SELECT c0, c1, c2, c3, c4, c5, CAST(make_timestamp(c6) AS TIMESTAMP), CAST(make_timestamp(c7) AS TIMESTAMP), c8, c9, c10, c11 FROM recognition_rows;
SELECT recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_030cbb4e JOIN recognition_ledger ON recognition_ledger.table_name = ? AND recognition_ledger.key_column = ? AND recognition_ledger.key_value = recognition_stage_030cbb4e.equal_0 AND recognition_ledger.workspace = recognition_stage_030cbb4e.workspace AND recognition_ledger.sequence >= recognition_stage_030cbb4e.sequence ORDER BY recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
SELECT recognition_stage_030cbb4e.update_id, count(CASE WHEN (events.context_traits_email IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_0 AND events.user_id IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_1) THEN 1 END) AS rows, count(CASE WHEN (events.user_id IS NULL) THEN 1 END) AS wanting 
FROM recognition_stage_030cbb4e JOIN events ON events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT)) GROUP BY recognition_stage_030cbb4e.update_id;
DROP TABLE recognition_stage_030cbb4e;
COMMIT;

-- a stage: the first one again, beside one of another device
CREATE TEMPORARY TABLE recognition_stage_030cbb4e AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP) AS start_0, CAST(NULL AS TIMESTAMP) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.context_traits_email AS value_0, events.user_id AS value_1 
FROM events 
WHERE 1 = 0;
INSERT INTO recognition_stage_030cbb4e SELECT c0, c1, c2, c3, c4, c5, CAST(make_timestamp(c6) AS TIMESTAMP), CAST(make_timestamp(c7) AS TIMESTAMP), c8, c9, c10, c11 FROM recognition_rows;
SELECT recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_030cbb4e JOIN recognition_ledger ON recognition_ledger.table_name = ? AND recognition_ledger.key_column = ? AND recognition_ledger.key_value = recognition_stage_030cbb4e.equal_0 AND recognition_ledger.workspace = recognition_stage_030cbb4e.workspace AND recognition_ledger.sequence >= recognition_stage_030cbb4e.sequence ORDER BY recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
CREATE TEMPORARY TABLE recognition_stage_030cbb4e_1 AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP) AS start_0, CAST(NULL AS TIMESTAMP) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.context_traits_email AS value_0, events.user_id AS value_1 
FROM events 
WHERE 1 = 0;
INSERT INTO recognition_stage_030cbb4e_1 SELECT c0, c1, c2, c3, c4, c5, CAST(make_timestamp(c6) AS TIMESTAMP), CAST(make_timestamp(c7) AS TIMESTAMP), c8, c9, c10, c11 FROM recognition_rows;
UPDATE events SET user_id=recognition_stage_030cbb4e.value_1, context_traits_email=recognition_stage_030cbb4e.value_0 FROM recognition_stage_030cbb4e WHERE events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.user_id IS NULL AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT));
SELECT recognition_stage_030cbb4e.update_id, count(*) AS rows 
FROM recognition_stage_030cbb4e JOIN events ON events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.context_traits_email IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_0 AND events.user_id IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_1 AND events.timestamp >= make_timestamp(CAST(? AS BIGINT)) AND events.timestamp < make_timestamp(CAST(? AS BIGINT)) GROUP BY recognition_stage_030cbb4e.update_id;
INSERT INTO recognition_ledger (update_id, workspace, table_name, key_column, key_value, message_column, message_id, extras, columns, empty, time_column, starts, ends, sequence, applied_at) SELECT recognition_stage_030cbb4e_1.update_id, recognition_stage_030cbb4e_1.workspace, CAST(? AS TEXT) AS anon_1, CAST(? AS TEXT) AS anon_2, recognition_stage_030cbb4e_1.equal_0, CAST(? AS TEXT) AS anon_3, CAST(? AS TEXT) AS anon_4, recognition_stage_030cbb4e_1.extras, CAST(? AS TEXT) AS anon_5, CAST(? AS TEXT) AS anon_6, CAST(? AS TEXT) AS anon_7, recognition_stage_030cbb4e_1.starts_0, recognition_stage_030cbb4e_1.ends_0, recognition_stage_030cbb4e_1.sequence, CAST(? AS BIGINT) AS anon_8 
FROM recognition_stage_030cbb4e_1 
WHERE recognition_stage_030cbb4e_1.extras IS NOT NULL;
DROP TABLE recognition_stage_030cbb4e;
DROP TABLE recognition_stage_030cbb4e_1;
COMMIT;

-- a stage: a user who became another
CREATE TEMPORARY TABLE recognition_stage_89103d2e AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, events.user_id AS equal_0, events.user_id AS value_1 
FROM events 
WHERE 1 = 0;
INSERT INTO recognition_stage_89103d2e SELECT c0, c1, c2, c3 FROM recognition_rows;
UPDATE events SET user_id=recognition_stage_89103d2e.value_1, recognition_version=recognition_stage_89103d2e.sequence FROM recognition_stage_89103d2e WHERE events.user_id = recognition_stage_89103d2e.equal_0 AND (events.recognition_version IS NULL OR events.recognition_version < recognition_stage_89103d2e.sequence OR events.recognition_version = recognition_stage_89103d2e.sequence AND events.user_id IS DISTINCT FROM recognition_stage_89103d2e.value_1) AND (events.user_id IS NULL OR events.recognition_version IS NOT NULL);
DROP TABLE recognition_stage_89103d2e;
COMMIT;
