-- a stage: a device's rows in an interval, where nobody is known
SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), set_config('extra_float_digits', '1', true), set_config('idle_in_transaction_session_timeout', %s, true);
SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int), has_any_column_privilege(%s::oid, 'SELECT'), has_any_column_privilege(%s::oid, 'UPDATE');
CREATE TEMPORARY TABLE recognition_stage_030cbb4e AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS start_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.context_traits_email AS value_0, events.user_id AS value_1 
FROM events 
WHERE 1 = 0;
CREATE INDEX ON recognition_stage_030cbb4e USING hash (equal_0);
ANALYZE recognition_stage_030cbb4e (workspace, equal_0);
SELECT recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_030cbb4e JOIN recognition_ledger ON recognition_ledger.table_name = %(table_name_1)s::VARCHAR AND recognition_ledger.key_column = %(key_column_1)s::VARCHAR AND recognition_ledger.key_value = recognition_stage_030cbb4e.equal_0 AND recognition_ledger.workspace = recognition_stage_030cbb4e.workspace AND recognition_ledger.sequence >= recognition_stage_030cbb4e.sequence ORDER BY recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
UPDATE events SET user_id=recognition_stage_030cbb4e.value_1, context_traits_email=recognition_stage_030cbb4e.value_0 FROM recognition_stage_030cbb4e WHERE events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.user_id IS NULL AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE;
SELECT recognition_stage_030cbb4e.update_id, count(*) AS rows 
FROM recognition_stage_030cbb4e JOIN events ON events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.context_traits_email IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_0 AND events.user_id IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_1 AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE GROUP BY recognition_stage_030cbb4e.update_id;
INSERT INTO recognition_ledger (update_id, workspace, table_name, key_column, key_value, message_column, message_id, extras, columns, empty, time_column, starts, ends, sequence, applied_at) SELECT recognition_stage_030cbb4e.update_id, recognition_stage_030cbb4e.workspace, CAST(%(param_1)s::VARCHAR AS TEXT) AS anon_1, CAST(%(param_2)s::VARCHAR AS TEXT) AS anon_2, recognition_stage_030cbb4e.equal_0, CAST(%(param_3)s::VARCHAR AS TEXT) AS anon_3, CAST(%(param_4)s::VARCHAR AS TEXT) AS anon_4, recognition_stage_030cbb4e.extras, CAST(%(param_5)s::VARCHAR AS TEXT) AS anon_5, CAST(%(param_6)s::VARCHAR AS TEXT) AS anon_6, CAST(%(param_7)s::VARCHAR AS TEXT) AS anon_7, recognition_stage_030cbb4e.starts_0, recognition_stage_030cbb4e.ends_0, recognition_stage_030cbb4e.sequence, CAST(%(param_8)s::BIGINT AS BIGINT) AS anon_8 
FROM recognition_stage_030cbb4e 
WHERE recognition_stage_030cbb4e.extras IS NOT NULL;
DROP TABLE recognition_stage_030cbb4e;
COMMIT;

-- a stage: the same, in a table with versions
SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), set_config('extra_float_digits', '1', true), set_config('idle_in_transaction_session_timeout', %s, true);
SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int), has_any_column_privilege(%s::oid, 'SELECT'), has_any_column_privilege(%s::oid, 'UPDATE');
CREATE TEMPORARY TABLE recognition_stage_25c95e93 AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS start_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.context_traits_email AS value_0, events.user_id AS value_2 
FROM events 
WHERE 1 = 0;
CREATE INDEX ON recognition_stage_25c95e93 USING hash (equal_0);
ANALYZE recognition_stage_25c95e93 (equal_0);
UPDATE events SET user_id=recognition_stage_25c95e93.value_2, context_traits_email=recognition_stage_25c95e93.value_0, recognition_version=recognition_stage_25c95e93.sequence FROM recognition_stage_25c95e93 WHERE events.anonymous_id = recognition_stage_25c95e93.equal_0 AND events.timestamp >= recognition_stage_25c95e93.start_0 AND events.timestamp < recognition_stage_25c95e93.end_0 AND (events.recognition_version IS NULL OR events.recognition_version < recognition_stage_25c95e93.sequence OR events.recognition_version = recognition_stage_25c95e93.sequence AND (events.context_traits_email IS DISTINCT FROM recognition_stage_25c95e93.value_0 OR events.user_id IS DISTINCT FROM recognition_stage_25c95e93.value_2)) AND (events.user_id IS NULL OR events.recognition_version IS NOT NULL) AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE;
SELECT recognition_stage_25c95e93.update_id, count(*) AS rows 
FROM recognition_stage_25c95e93 JOIN events ON events.anonymous_id = recognition_stage_25c95e93.equal_0 AND events.timestamp >= recognition_stage_25c95e93.start_0 AND events.timestamp < recognition_stage_25c95e93.end_0 AND events.recognition_version >= recognition_stage_25c95e93.sequence AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE GROUP BY recognition_stage_25c95e93.update_id;
DROP TABLE recognition_stage_25c95e93;
COMMIT;

-- a stage: a column of recognition's own, set whatever it holds
SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), set_config('extra_float_digits', '1', true), set_config('idle_in_transaction_session_timeout', %s, true);
SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int), has_any_column_privilege(%s::oid, 'SELECT'), has_any_column_privilege(%s::oid, 'UPDATE');
CREATE TEMPORARY TABLE recognition_stage_41e62109 AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, events.stitched_user_id AS value_0 
FROM events 
WHERE 1 = 0;
CREATE INDEX ON recognition_stage_41e62109 USING hash (equal_0);
ANALYZE recognition_stage_41e62109 (workspace, equal_0);
SELECT recognition_stage_41e62109.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_41e62109 JOIN recognition_ledger ON recognition_ledger.table_name = %(table_name_1)s::VARCHAR AND recognition_ledger.key_column = %(key_column_1)s::VARCHAR AND recognition_ledger.key_value = recognition_stage_41e62109.equal_0 AND recognition_ledger.workspace = recognition_stage_41e62109.workspace AND recognition_ledger.sequence >= recognition_stage_41e62109.sequence ORDER BY recognition_stage_41e62109.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
UPDATE events SET stitched_user_id=recognition_stage_41e62109.value_0 FROM recognition_stage_41e62109 WHERE events.anonymous_id = recognition_stage_41e62109.equal_0 AND events.stitched_user_id IS DISTINCT FROM recognition_stage_41e62109.value_0;
SELECT recognition_stage_41e62109.update_id, count(*) AS rows 
FROM recognition_stage_41e62109 JOIN events ON events.anonymous_id = recognition_stage_41e62109.equal_0 AND events.stitched_user_id IS NOT DISTINCT FROM recognition_stage_41e62109.value_0 GROUP BY recognition_stage_41e62109.update_id;
INSERT INTO recognition_ledger (update_id, workspace, table_name, key_column, key_value, message_column, message_id, extras, columns, empty, time_column, starts, ends, sequence, applied_at) SELECT recognition_stage_41e62109.update_id, recognition_stage_41e62109.workspace, CAST(%(param_1)s::VARCHAR AS TEXT) AS anon_1, CAST(%(param_2)s::VARCHAR AS TEXT) AS anon_2, recognition_stage_41e62109.equal_0, CAST(%(param_3)s::VARCHAR AS TEXT) AS anon_3, CAST(%(param_4)s::VARCHAR AS TEXT) AS anon_4, recognition_stage_41e62109.extras, CAST(%(param_5)s::VARCHAR AS TEXT) AS anon_5, CAST(%(param_6)s::VARCHAR AS TEXT) AS anon_6, CAST(%(param_7)s::VARCHAR AS TEXT) AS anon_7, CAST(NULL AS BIGINT) AS anon_8, CAST(NULL AS BIGINT) AS anon__1, recognition_stage_41e62109.sequence, CAST(%(param_8)s::BIGINT AS BIGINT) AS anon_9 
FROM recognition_stage_41e62109 
WHERE recognition_stage_41e62109.extras IS NOT NULL;
DROP TABLE recognition_stage_41e62109;
COMMIT;

-- a stage: messages of a device
SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), set_config('extra_float_digits', '1', true), set_config('idle_in_transaction_session_timeout', %s, true);
SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int), has_any_column_privilege(%s::oid, 'SELECT'), has_any_column_privilege(%s::oid, 'UPDATE');
CREATE TEMPORARY TABLE recognition_stage_f0271362 AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, events.message_id AS equal_1, events.stitched_user_id AS value_0 
FROM events 
WHERE 1 = 0;
CREATE INDEX ON recognition_stage_f0271362 USING hash (equal_0);
CREATE INDEX ON recognition_stage_f0271362 USING hash (equal_1);
ANALYZE recognition_stage_f0271362 (workspace, equal_0, equal_1);
SELECT recognition_stage_f0271362.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_f0271362 JOIN recognition_ledger ON recognition_ledger.table_name = %(table_name_1)s::VARCHAR AND recognition_ledger.key_column = %(key_column_1)s::VARCHAR AND recognition_ledger.key_value = recognition_stage_f0271362.equal_0 AND recognition_ledger.workspace = recognition_stage_f0271362.workspace AND recognition_ledger.sequence >= recognition_stage_f0271362.sequence ORDER BY recognition_stage_f0271362.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
UPDATE events SET stitched_user_id=recognition_stage_f0271362.value_0 FROM recognition_stage_f0271362 WHERE events.anonymous_id = recognition_stage_f0271362.equal_0 AND events.message_id = recognition_stage_f0271362.equal_1 AND events.stitched_user_id IS DISTINCT FROM recognition_stage_f0271362.value_0 AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE;
SELECT recognition_stage_f0271362.update_id, count(*) AS rows 
FROM recognition_stage_f0271362 JOIN events ON events.anonymous_id = recognition_stage_f0271362.equal_0 AND events.message_id = recognition_stage_f0271362.equal_1 AND events.stitched_user_id IS NOT DISTINCT FROM recognition_stage_f0271362.value_0 AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE GROUP BY recognition_stage_f0271362.update_id;
INSERT INTO recognition_ledger (update_id, workspace, table_name, key_column, key_value, message_column, message_id, extras, columns, empty, time_column, starts, ends, sequence, applied_at) SELECT recognition_stage_f0271362.update_id, recognition_stage_f0271362.workspace, CAST(%(param_1)s::VARCHAR AS TEXT) AS anon_1, CAST(%(param_2)s::VARCHAR AS TEXT) AS anon_2, recognition_stage_f0271362.equal_0, CAST(%(param_3)s::VARCHAR AS TEXT) AS anon_3, recognition_stage_f0271362.equal_1, recognition_stage_f0271362.extras, CAST(%(param_4)s::VARCHAR AS TEXT) AS anon_4, CAST(%(param_5)s::VARCHAR AS TEXT) AS anon_5, CAST(%(param_6)s::VARCHAR AS TEXT) AS anon_6, CAST(NULL AS BIGINT) AS anon_7, CAST(NULL AS BIGINT) AS anon__1, recognition_stage_f0271362.sequence, CAST(%(param_7)s::BIGINT AS BIGINT) AS anon_8 
FROM recognition_stage_f0271362 
WHERE recognition_stage_f0271362.extras IS NOT NULL;
DROP TABLE recognition_stage_f0271362;
COMMIT;

-- a stage: a device's interval, of which a later update named messages
SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), set_config('extra_float_digits', '1', true), set_config('idle_in_transaction_session_timeout', %s, true);
SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int), has_any_column_privilege(%s::oid, 'SELECT'), has_any_column_privilege(%s::oid, 'UPDATE');
CREATE TEMPORARY TABLE recognition_stage_e8cba12a AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS start_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.stitched_user_id AS value_0 
FROM events 
WHERE 1 = 0;
CREATE INDEX ON recognition_stage_e8cba12a USING hash (equal_0);
ANALYZE recognition_stage_e8cba12a (workspace, equal_0);
SELECT recognition_stage_e8cba12a.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_e8cba12a JOIN recognition_ledger ON recognition_ledger.table_name = %(table_name_1)s::VARCHAR AND recognition_ledger.key_column = %(key_column_1)s::VARCHAR AND recognition_ledger.key_value = recognition_stage_e8cba12a.equal_0 AND recognition_ledger.workspace = recognition_stage_e8cba12a.workspace AND recognition_ledger.sequence >= recognition_stage_e8cba12a.sequence ORDER BY recognition_stage_e8cba12a.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
CREATE TEMPORARY TABLE recognition_stage_e8cba12a_1 AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS start_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.stitched_user_id AS value_0 
FROM events 
WHERE 1 = 0;
CREATE INDEX ON recognition_stage_e8cba12a_1 USING hash (equal_0);
ANALYZE recognition_stage_e8cba12a_1 (workspace, equal_0);
UPDATE events SET stitched_user_id=recognition_stage_e8cba12a_1.value_0 FROM recognition_stage_e8cba12a_1 WHERE events.anonymous_id = recognition_stage_e8cba12a_1.equal_0 AND events.timestamp >= recognition_stage_e8cba12a_1.start_0 AND events.timestamp < recognition_stage_e8cba12a_1.end_0 AND events.stitched_user_id IS DISTINCT FROM recognition_stage_e8cba12a_1.value_0 AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE AND NOT (EXISTS (SELECT 1 
FROM recognition_ledger 
WHERE recognition_ledger.table_name = %(table_name_1)s::VARCHAR AND recognition_ledger.key_column = %(key_column_1)s::VARCHAR AND recognition_ledger.key_value = recognition_stage_e8cba12a_1.equal_0 AND recognition_ledger.workspace = recognition_stage_e8cba12a_1.workspace AND recognition_ledger.message_column = %(message_column_1)s::VARCHAR AND recognition_ledger.columns = %(columns_1)s::VARCHAR AND recognition_ledger.extras = %(extras_1)s::VARCHAR AND (recognition_ledger.sequence > recognition_stage_e8cba12a_1.sequence OR recognition_ledger.sequence = recognition_stage_e8cba12a_1.sequence AND recognition_ledger.update_id > recognition_stage_e8cba12a_1.update_id) AND recognition_ledger.message_id = events.message_id));
SELECT recognition_stage_e8cba12a_1.update_id, count(*) AS rows 
FROM recognition_stage_e8cba12a_1 JOIN events ON events.anonymous_id = recognition_stage_e8cba12a_1.equal_0 AND events.timestamp >= recognition_stage_e8cba12a_1.start_0 AND events.timestamp < recognition_stage_e8cba12a_1.end_0 AND events.stitched_user_id IS NOT DISTINCT FROM recognition_stage_e8cba12a_1.value_0 AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE GROUP BY recognition_stage_e8cba12a_1.update_id;
INSERT INTO recognition_ledger (update_id, workspace, table_name, key_column, key_value, message_column, message_id, extras, columns, empty, time_column, starts, ends, sequence, applied_at) SELECT recognition_stage_e8cba12a_1.update_id, recognition_stage_e8cba12a_1.workspace, CAST(%(param_1)s::VARCHAR AS TEXT) AS anon_1, CAST(%(param_2)s::VARCHAR AS TEXT) AS anon_2, recognition_stage_e8cba12a_1.equal_0, CAST(%(param_3)s::VARCHAR AS TEXT) AS anon_3, CAST(%(param_4)s::VARCHAR AS TEXT) AS anon_4, recognition_stage_e8cba12a_1.extras, CAST(%(param_5)s::VARCHAR AS TEXT) AS anon_5, CAST(%(param_6)s::VARCHAR AS TEXT) AS anon_6, CAST(%(param_7)s::VARCHAR AS TEXT) AS anon_7, recognition_stage_e8cba12a_1.starts_0, recognition_stage_e8cba12a_1.ends_0, recognition_stage_e8cba12a_1.sequence, CAST(%(param_8)s::BIGINT AS BIGINT) AS anon_8 
FROM recognition_stage_e8cba12a_1 
WHERE recognition_stage_e8cba12a_1.extras IS NOT NULL;
DROP TABLE recognition_stage_e8cba12a;
DROP TABLE recognition_stage_e8cba12a_1;
COMMIT;

-- a stage: the first one again, which changes nothing
SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), set_config('extra_float_digits', '1', true), set_config('idle_in_transaction_session_timeout', %s, true);
SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int), has_any_column_privilege(%s::oid, 'SELECT'), has_any_column_privilege(%s::oid, 'UPDATE');
CREATE TEMPORARY TABLE recognition_stage_030cbb4e AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS start_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.context_traits_email AS value_0, events.user_id AS value_1 
FROM events 
WHERE 1 = 0;
CREATE INDEX ON recognition_stage_030cbb4e USING hash (equal_0);
ANALYZE recognition_stage_030cbb4e (workspace, equal_0);
SELECT recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_030cbb4e JOIN recognition_ledger ON recognition_ledger.table_name = %(table_name_1)s::VARCHAR AND recognition_ledger.key_column = %(key_column_1)s::VARCHAR AND recognition_ledger.key_value = recognition_stage_030cbb4e.equal_0 AND recognition_ledger.workspace = recognition_stage_030cbb4e.workspace AND recognition_ledger.sequence >= recognition_stage_030cbb4e.sequence ORDER BY recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
SELECT recognition_stage_030cbb4e.update_id, count(CASE WHEN (events.context_traits_email IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_0 AND events.user_id IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_1) THEN 1 END) AS rows, count(CASE WHEN (events.user_id IS NULL) THEN 1 END) AS wanting 
FROM recognition_stage_030cbb4e JOIN events ON events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE GROUP BY recognition_stage_030cbb4e.update_id;
DROP TABLE recognition_stage_030cbb4e;
COMMIT;

-- a stage: the first one again, beside one of another device
SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), set_config('extra_float_digits', '1', true), set_config('idle_in_transaction_session_timeout', %s, true);
SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int), has_any_column_privilege(%s::oid, 'SELECT'), has_any_column_privilege(%s::oid, 'UPDATE');
CREATE TEMPORARY TABLE recognition_stage_030cbb4e AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS start_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.context_traits_email AS value_0, events.user_id AS value_1 
FROM events 
WHERE 1 = 0;
CREATE INDEX ON recognition_stage_030cbb4e USING hash (equal_0);
ANALYZE recognition_stage_030cbb4e (workspace, equal_0);
SELECT recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM recognition_stage_030cbb4e JOIN recognition_ledger ON recognition_ledger.table_name = %(table_name_1)s::VARCHAR AND recognition_ledger.key_column = %(key_column_1)s::VARCHAR AND recognition_ledger.key_value = recognition_stage_030cbb4e.equal_0 AND recognition_ledger.workspace = recognition_stage_030cbb4e.workspace AND recognition_ledger.sequence >= recognition_stage_030cbb4e.sequence ORDER BY recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
CREATE TEMPORARY TABLE recognition_stage_030cbb4e_1 AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, CAST(NULL AS TEXT) AS workspace, CAST(NULL AS BIGINT) AS position, CAST(NULL AS TEXT) AS extras, events.anonymous_id AS equal_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS start_0, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS end_0, CAST(NULL AS BIGINT) AS starts_0, CAST(NULL AS BIGINT) AS ends_0, events.context_traits_email AS value_0, events.user_id AS value_1 
FROM events 
WHERE 1 = 0;
CREATE INDEX ON recognition_stage_030cbb4e_1 USING hash (equal_0);
ANALYZE recognition_stage_030cbb4e_1 (workspace, equal_0);
UPDATE events SET user_id=recognition_stage_030cbb4e.value_1, context_traits_email=recognition_stage_030cbb4e.value_0 FROM recognition_stage_030cbb4e WHERE events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.user_id IS NULL AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE;
SELECT recognition_stage_030cbb4e.update_id, count(*) AS rows 
FROM recognition_stage_030cbb4e JOIN events ON events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.context_traits_email IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_0 AND events.user_id IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_1 AND events.timestamp >= %(param_1)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_2)s::TIMESTAMP WITH TIME ZONE GROUP BY recognition_stage_030cbb4e.update_id;
INSERT INTO recognition_ledger (update_id, workspace, table_name, key_column, key_value, message_column, message_id, extras, columns, empty, time_column, starts, ends, sequence, applied_at) SELECT recognition_stage_030cbb4e_1.update_id, recognition_stage_030cbb4e_1.workspace, CAST(%(param_1)s::VARCHAR AS TEXT) AS anon_1, CAST(%(param_2)s::VARCHAR AS TEXT) AS anon_2, recognition_stage_030cbb4e_1.equal_0, CAST(%(param_3)s::VARCHAR AS TEXT) AS anon_3, CAST(%(param_4)s::VARCHAR AS TEXT) AS anon_4, recognition_stage_030cbb4e_1.extras, CAST(%(param_5)s::VARCHAR AS TEXT) AS anon_5, CAST(%(param_6)s::VARCHAR AS TEXT) AS anon_6, CAST(%(param_7)s::VARCHAR AS TEXT) AS anon_7, recognition_stage_030cbb4e_1.starts_0, recognition_stage_030cbb4e_1.ends_0, recognition_stage_030cbb4e_1.sequence, CAST(%(param_8)s::BIGINT AS BIGINT) AS anon_8 
FROM recognition_stage_030cbb4e_1 
WHERE recognition_stage_030cbb4e_1.extras IS NOT NULL;
DROP TABLE recognition_stage_030cbb4e;
DROP TABLE recognition_stage_030cbb4e_1;
COMMIT;

-- a stage: a user who became another
SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), set_config('extra_float_digits', '1', true), set_config('idle_in_transaction_session_timeout', %s, true);
SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int), has_any_column_privilege(%s::oid, 'SELECT'), has_any_column_privilege(%s::oid, 'UPDATE');
CREATE TEMPORARY TABLE recognition_stage_89103d2e AS SELECT CAST(NULL AS TEXT) AS update_id, CAST(NULL AS BIGINT) AS sequence, events.user_id AS equal_0, events.user_id AS value_1 
FROM events 
WHERE 1 = 0;
CREATE INDEX ON recognition_stage_89103d2e USING hash (equal_0);
ANALYZE recognition_stage_89103d2e (equal_0);
UPDATE events SET user_id=recognition_stage_89103d2e.value_1, recognition_version=recognition_stage_89103d2e.sequence FROM recognition_stage_89103d2e WHERE events.user_id = recognition_stage_89103d2e.equal_0 AND (events.recognition_version IS NULL OR events.recognition_version < recognition_stage_89103d2e.sequence OR events.recognition_version = recognition_stage_89103d2e.sequence AND events.user_id IS DISTINCT FROM recognition_stage_89103d2e.value_1) AND (events.user_id IS NULL OR events.recognition_version IS NOT NULL);
DROP TABLE recognition_stage_89103d2e;
COMMIT;

-- rows inside: a device's rows in an interval, where nobody is known
SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), set_config('extra_float_digits', '1', true), set_config('idle_in_transaction_session_timeout', %s, true);
SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int), has_any_column_privilege(%s::oid, 'SELECT'), has_any_column_privilege(%s::oid, 'UPDATE');
SELECT recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.columns, recognition_ledger.empty, recognition_ledger.message_column, recognition_ledger.message_id, recognition_ledger.extras, recognition_ledger.time_column, recognition_ledger.starts, recognition_ledger.ends 
FROM unnest(CAST(%(param_1)s AS text[]), CAST(%(param_2)s AS bigint[]), CAST(%(param_3)s AS text[]), CAST(%(param_4)s AS bigint[]), CAST(%(param_5)s AS text[]), CAST(%(param_6)s AS text[]), CAST(%(param_7)s AS timestamptz[]), CAST(%(param_8)s AS timestamptz[]), CAST(%(param_9)s AS bigint[]), CAST(%(param_10)s AS bigint[]), CAST(%(param_11)s AS text[]), CAST(%(param_12)s AS text[])) AS recognition_stage_030cbb4e(update_id, sequence, workspace, position, extras, equal_0, start_0, end_0, starts_0, ends_0, value_0, value_1) JOIN recognition_ledger ON recognition_ledger.table_name = %(table_name_1)s::VARCHAR AND recognition_ledger.key_column = %(key_column_1)s::VARCHAR AND recognition_ledger.key_value = recognition_stage_030cbb4e.equal_0 AND recognition_ledger.workspace = recognition_stage_030cbb4e.workspace AND recognition_ledger.sequence >= recognition_stage_030cbb4e.sequence ORDER BY recognition_stage_030cbb4e.position, recognition_ledger.sequence, recognition_ledger.update_id, recognition_ledger.starts;
SELECT recognition_stage_030cbb4e.update_id, count(CASE WHEN (events.context_traits_email IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_0 AND events.user_id IS NOT DISTINCT FROM recognition_stage_030cbb4e.value_1) THEN 1 END) AS rows, count(CASE WHEN (events.user_id IS NULL) THEN 1 END) AS wanting 
FROM unnest(CAST(%(param_1)s AS text[]), CAST(%(param_2)s AS bigint[]), CAST(%(param_3)s AS text[]), CAST(%(param_4)s AS bigint[]), CAST(%(param_5)s AS text[]), CAST(%(param_6)s AS text[]), CAST(%(param_7)s AS timestamptz[]), CAST(%(param_8)s AS timestamptz[]), CAST(%(param_9)s AS bigint[]), CAST(%(param_10)s AS bigint[]), CAST(%(param_11)s AS text[]), CAST(%(param_12)s AS text[])) AS recognition_stage_030cbb4e(update_id, sequence, workspace, position, extras, equal_0, start_0, end_0, starts_0, ends_0, value_0, value_1) JOIN events ON events.anonymous_id = recognition_stage_030cbb4e.equal_0 AND events.timestamp >= recognition_stage_030cbb4e.start_0 AND events.timestamp < recognition_stage_030cbb4e.end_0 AND events.timestamp >= %(param_13)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_14)s::TIMESTAMP WITH TIME ZONE GROUP BY recognition_stage_030cbb4e.update_id;
COMMIT;

-- rows inside: the same, in a table with versions
SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true), set_config('extra_float_digits', '1', true), set_config('idle_in_transaction_session_timeout', %s, true);
SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int), has_any_column_privilege(%s::oid, 'SELECT'), has_any_column_privilege(%s::oid, 'UPDATE');
UPDATE events SET user_id=recognition_stage_25c95e93.value_2, context_traits_email=recognition_stage_25c95e93.value_0, recognition_version=recognition_stage_25c95e93.sequence FROM unnest(CAST(%(param_1)s AS text[]), CAST(%(param_2)s AS bigint[]), CAST(%(param_3)s AS text[]), CAST(%(param_4)s AS timestamptz[]), CAST(%(param_5)s AS timestamptz[]), CAST(%(param_6)s AS bigint[]), CAST(%(param_7)s AS bigint[]), CAST(%(param_8)s AS text[]), CAST(%(param_9)s AS text[])) AS recognition_stage_25c95e93(update_id, sequence, equal_0, start_0, end_0, starts_0, ends_0, value_0, value_2) WHERE events.anonymous_id = recognition_stage_25c95e93.equal_0 AND events.timestamp >= recognition_stage_25c95e93.start_0 AND events.timestamp < recognition_stage_25c95e93.end_0 AND (events.recognition_version IS NULL OR events.recognition_version < recognition_stage_25c95e93.sequence OR events.recognition_version = recognition_stage_25c95e93.sequence AND (events.context_traits_email IS DISTINCT FROM recognition_stage_25c95e93.value_0 OR events.user_id IS DISTINCT FROM recognition_stage_25c95e93.value_2)) AND (events.user_id IS NULL OR events.recognition_version IS NOT NULL) AND events.timestamp >= %(param_10)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_11)s::TIMESTAMP WITH TIME ZONE;
SELECT recognition_stage_25c95e93.update_id, count(*) AS rows 
FROM unnest(CAST(%(param_1)s AS text[]), CAST(%(param_2)s AS bigint[]), CAST(%(param_3)s AS text[]), CAST(%(param_4)s AS timestamptz[]), CAST(%(param_5)s AS timestamptz[]), CAST(%(param_6)s AS bigint[]), CAST(%(param_7)s AS bigint[]), CAST(%(param_8)s AS text[]), CAST(%(param_9)s AS text[])) AS recognition_stage_25c95e93(update_id, sequence, equal_0, start_0, end_0, starts_0, ends_0, value_0, value_2) JOIN events ON events.anonymous_id = recognition_stage_25c95e93.equal_0 AND events.timestamp >= recognition_stage_25c95e93.start_0 AND events.timestamp < recognition_stage_25c95e93.end_0 AND events.recognition_version >= recognition_stage_25c95e93.sequence AND events.timestamp >= %(param_10)s::TIMESTAMP WITH TIME ZONE AND events.timestamp < %(param_11)s::TIMESTAMP WITH TIME ZONE GROUP BY recognition_stage_25c95e93.update_id;
COMMIT;
