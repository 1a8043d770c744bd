/* The module mpillm.comm._kernel: Python types and functions over arithmetic.c and team.c, and, in
 * module_queue.c, over spsc_queue.c. Only mpillm/comm/kernel.py loads it. */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <string.h>

#include "flags.h"
#include "module.h"
#include "spsc_queue.h"
#include "team.h"

/* Steps of one Test(): a small operation needs three; a large one must leave time for computation. */
#define MOVES_A_TEST 4

/* ---- Waiting ---- */

bool is_gone(pid_t process) { return process > 0 && kill(process, 0) != 0 && errno == ESRCH; }

int wait_for(void *waiting, bool (*step)(void *, double), bool (*may_come)(void *), double limit_seconds) {
    for (double waited = 0;; waited += SLICE_SECONDS) {
        const double left = limit_seconds - waited, slice = left < SLICE_SECONDS ? left : SLICE_SECONDS;
        bool done;
        Py_BEGIN_ALLOW_THREADS
        done = step(waiting, slice);
        Py_END_ALLOW_THREADS
        if (done)
            return 1;
        if (PyErr_CheckSignals() < 0 || (waited > SUSPICION_SECONDS && !may_come(waiting)))
            return -1;
        if (slice < SLICE_SECONDS)
            return 0;
    }
}

/* ---- Team ---- */

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    struct team team;
    unsigned spins;
    PyObject *error;
    pid_t *processes; /* of the ranks, 0 for a process that cannot be signalled */
} Team;

static PyTypeObject OperationType;

static int team_init(Team *self, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"memory", "rank", "size", "staging_bytes", "spins", "processes", "error", NULL};
    PyObject *processes;
    Py_ssize_t staging_bytes;
    if (self->memory.obj != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "a team is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "w*iinIO!O", names, &self->memory, &self->team.rank,
                                     &self->team.size, &staging_bytes, &self->spins, &PyTuple_Type, &processes,
                                     &self->error))
        return -1;
    Py_INCREF(self->error);
    const int size = self->team.size;
    self->team.memory = self->memory.buf;
    self->team.staging_bytes = (size_t)staging_bytes;
    atomic_flag_clear(&self->team.busy);
    if (size < 1 || size > MOST_ROWS || self->team.rank < 0 || self->team.rank >= size ||
        staging_bytes < 64 * (Py_ssize_t)size || PyTuple_GET_SIZE(processes) != size ||
        (size_t)self->memory.len < team_bytes(size, (size_t)staging_bytes)) {
        PyErr_SetString(PyExc_ValueError, "a team's rank, size, staging buffer, processes and memory must fit each other");
        return -1;
    }
    self->processes = PyMem_Calloc((size_t)size, sizeof *self->processes);
    if (self->processes == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int rank = 0; rank < size; rank++)
        self->processes[rank] = (pid_t)PyLong_AsLong(PyTuple_GET_ITEM(processes, rank));
    return PyErr_Occurred() ? -1 : 0;
}

static void team_dealloc(Team *self) {
    if (self->memory.obj != NULL)
        PyBuffer_Release(&self->memory);
    PyMem_Free(self->processes);
    Py_XDECREF(self->error);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* ---- Operation ---- */

typedef struct {
    PyObject_HEAD
    Team *team;
    Py_buffer source, target;
    PyObject *held[2]; /* references that keep the rows' memory alive: of sources, and of targets */
    unsigned char **rows[2];
    struct operation operation;
    double idle_since; /* the time of the first Test() that found nothing to do; 0 after progress */
} Operation;

/* Take the rows of the sources (0) or of the targets (1). A row holds the whole array. */
static bool fill_rows(Operation *self, int which, PyObject *rows) {
    if (rows == Py_None)
        return true;
    if (!PyTuple_Check(rows) || PyTuple_GET_SIZE(rows) != self->team->team.size) {
        PyErr_SetString(PyExc_ValueError, "rows are a tuple of one writable buffer a rank");
        return false;
    }
    const size_t nbytes = self->operation.count * itemsize_of(self->operation.element);
    unsigned char **places = PyMem_Calloc((size_t)self->team->team.size, sizeof *places);
    if (places == NULL) {
        PyErr_NoMemory();
        return false;
    }
    self->rows[which] = places;
    for (int rank = 0; rank < self->team->team.size; rank++) {
        Py_buffer row;
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(rows, rank), &row, PyBUF_WRITABLE) < 0)
            return false;
        places[rank] = row.buf;
        const bool fits = (size_t)row.len == nbytes;
        PyBuffer_Release(&row); /* `held` keeps the objects, and they keep their memory */
        if (!fits) {
            PyErr_SetString(PyExc_ValueError, "each row holds all elements");
            return false;
        }
    }
    Py_INCREF(rows);
    self->held[which] = rows;
    return true;
}

/* Does the operation have the rows and own arrays that its kind needs to push? */
static bool can_push(const struct operation *op) {
    switch (op->kind) {
    case ALLREDUCE:
        return op->source_rows != NULL && op->target_rows != NULL;
    case REDUCE_SCATTER:
        return op->source_rows != NULL && op->target != NULL;
    case ALLGATHER:
        return op->target_rows != NULL && op->source != NULL;
    default:
        return false;
    }
}

/* Check that a buffer holds all elements, or the own block alone. `*first`: the address of element 0
 * of the whole array, or where it would be. */
static bool place(Operation *self, const Py_buffer *buffer, bool own_block, unsigned char **first) {
    const struct operation *op = &self->operation;
    const size_t size = (size_t)op->team->size, rank = (size_t)op->team->rank, itemsize = itemsize_of(op->element);
    const size_t whole = op->count / size, rest = op->count % size;
    const size_t begin = own_block ? whole * rank + rest * rank / size : 0;
    const size_t stop = own_block ? whole * (rank + 1) + rest * (rank + 1) / size : op->count;
    if ((size_t)buffer->len != (stop - begin) * itemsize) {
        PyErr_Format(PyExc_ValueError, "a buffer of %zd bytes is to hold %zu elements of %zu bytes", buffer->len,
                     stop - begin, itemsize);
        return false;
    }
    *first = (unsigned char *)((uintptr_t)buffer->buf - begin * itemsize);
    return true;
}

static PyObject *team_operation(Team *self, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"kind", "source", "target", "count", "element", "reduction",
                            "scale", "root", "flat", "source_rows", "target_rows", NULL};
    int kind, element, reduction, root, flat;
    PyObject *source, *target, *source_rows, *target_rows;
    Py_ssize_t count;
    double scale;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "iOOniidipOO", names, &kind, &source, &target, &count,
                                     &element, &reduction, &scale, &root, &flat, &source_rows, &target_rows))
        return NULL;
    if (kind < 0 || kind >= N_KINDS || element < 0 || element >= N_ELEMENTS || reduction < 0 ||
        reduction >= N_REDUCTIONS || count < 0 || root < 0 || root >= self->team.size) {
        PyErr_SetString(PyExc_ValueError, "an operation's numbers are out of range");
        return NULL;
    }
    Operation *made = PyObject_New(Operation, &OperationType);
    if (made == NULL)
        return NULL;
    memset((char *)made + sizeof(PyObject), 0, sizeof *made - sizeof(PyObject));
    Py_INCREF(self);
    made->team = self;
    struct operation *op = &made->operation;
    op->team = &self->team;
    op->kind = (enum kind)kind;
    op->element = (enum element)element;
    op->reduction = (enum reduction)reduction;
    op->scale = scale;
    op->root = root;
    op->count = (size_t)count;
    op->flat = flat;
    unsigned char *first;
    if (source != Py_None) {
        if (PyObject_GetBuffer(source, &made->source, PyBUF_SIMPLE) < 0 ||
            !place(made, &made->source, kind == ALLGATHER && target != Py_None && source != target, &first))
            goto fail;
        op->source = first;
    }
    if (target != Py_None) {
        if (PyObject_GetBuffer(target, &made->target, PyBUF_WRITABLE) < 0 ||
            !place(made, &made->target, kind == REDUCE_SCATTER && source != target, &first))
            goto fail;
        op->target = first;
    }
    if (!fill_rows(made, 0, source_rows) || !fill_rows(made, 1, target_rows))
        goto fail;
    op->source_rows = made->rows[0];
    op->target_rows = made->rows[1];
    op->pushes = can_push(op);
    if ((op->source_rows != NULL || op->target_rows != NULL) && !op->pushes) {
        PyErr_SetString(PyExc_ValueError, "an operation with rows needs all that its kind works on");
        goto fail;
    }
    if (op->flat && op->count > piece_elements(&self->team, 1, op->element)) {
        PyErr_SetString(PyExc_ValueError, "a flat operation fits into one half of a staging buffer");
        goto fail;
    }
    return (PyObject *)made;
fail:
    Py_DECREF(made);
    return NULL;
}

static void operation_dealloc(Operation *self) {
    if (self->source.obj != NULL)
        PyBuffer_Release(&self->source);
    if (self->target.obj != NULL)
        PyBuffer_Release(&self->target);
    for (int which = 0; which < 2; which++) {
        PyMem_Free(self->rows[which]);
        Py_XDECREF(self->held[which]);
    }
    Py_XDECREF(self->team);
    PyObject_Free(self);
}

static bool drive_operation(void *waiting, double limit_seconds) {
    Operation *self = waiting;
    return drive(&self->operation, limit_seconds, self->team->spins);
}

/* Raise the team's error where a rank that this one waits for has ended. */
static bool all_live(void *waiting) {
    const Team *team = ((Operation *)waiting)->team;
    const int rank = awaited(&team->team);
    /* It may have published its part and ended since the first check: check its flag again. */
    if (rank < 0 || !is_gone(team->processes[rank]) || awaited(&team->team) != rank)
        return true;
    PyErr_Format(team->error,
                 "rank %d of this node (process %d) ended while rank %d waited for it in a collective; see its output "
                 "for the reason, a checkpoint resumes the run",
                 rank, (int)team->processes[rank], team->team.rank);
    return false;
}

/* The team's list has the address of a started operation, so a reference is held until it is done. */
static bool begin(Operation *self) {
    if (self->operation.started && !self->operation.done) {
        PyErr_SetString(self->team->error, "an operation was started again before it was done; wait for it first");
        return false;
    }
    while (atomic_flag_test_and_set_explicit(&self->team->team.busy, memory_order_acquire))
        ;
    start(&self->operation);
    self->idle_since = 0;
    atomic_flag_clear_explicit(&self->team->team.busy, memory_order_release);
    return true;
}

/* Drop the reference of a done operation. */
static void settle(Operation *self) {
    self->operation.started = false;
    Py_DECREF(self);
}

/* Test() detects a dead peer too, not only Wait(): a caller may poll in a loop of its own. */
static bool may_go_on(Operation *self, bool moved) {
    const double now = moved ? 0 : seconds_now();
    if (moved || self->idle_since == 0)
        self->idle_since = now;
    if (now - self->idle_since < SUSPICION_SECONDS)
        return true;
    self->idle_since = now;
    return all_live(self);
}

static PyObject *operation_start(Operation *self, PyObject *unused) {
    (void)unused;
    if (!begin(self))
        return NULL;
    Py_INCREF(self);
    progress(&self->team->team);
    Py_RETURN_NONE;
}

static PyObject *operation_test(Operation *self, PyObject *unused) {
    (void)unused;
    if (self->operation.started && !self->operation.done) {
        int moves = 0;
        Py_BEGIN_ALLOW_THREADS
        while (moves < MOVES_A_TEST && !self->operation.done && progress(&self->team->team))
            moves++;
        Py_END_ALLOW_THREADS
        if (!self->operation.done && !may_go_on(self, moves > 0))
            return NULL;
    }
    if (self->operation.started && self->operation.done)
        settle(self);
    return PyBool_FromLong(!self->operation.started);
}

static PyObject *operation_wait(Operation *self, PyObject *unused) {
    (void)unused;
    if (self->operation.started) {
        if (wait_for(self, drive_operation, all_live, INFINITY) < 0)
            return NULL; /* still held: it stays in the team's list */
        settle(self);
    }
    Py_RETURN_NONE;
}

static PyObject *operation_run(Operation *self, PyObject *unused) {
    if (!begin(self))
        return NULL;
    Py_INCREF(self);
    return operation_wait(self, unused);
}

static PyMethodDef operation_methods[] = {
    {"run", (PyCFunction)operation_run, METH_NOARGS, "Start it and wait until it is done."},
    {"start", (PyCFunction)operation_start, METH_NOARGS, "Start it; test or wait completes it."},
    {"test", (PyCFunction)operation_test, METH_NOARGS, "Make progress without waiting; True when it is done."},
    {"wait", (PyCFunction)operation_wait, METH_NOARGS, "Return when it is done."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject OperationType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "mpillm.comm.kernel.Operation",
    .tp_doc = "One collective of a team, ready to run any number of times.",
    .tp_basicsize = sizeof(Operation),
    .tp_dealloc = (destructor)operation_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = operation_methods,
};

static PyMethodDef team_methods[] = {
    {"operation", (PyCFunction)(void (*)(void))team_operation, METH_VARARGS | METH_KEYWORDS,
     "operation(kind, source, target, count, element, reduction, scale, root, flat, source_rows, target_rows)"},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject TeamType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "mpillm.comm.kernel.Team",
    .tp_doc = "Team(memory, rank, size, staging_bytes, spins, processes, error): the ranks of one node.",
    .tp_basicsize = sizeof(Team),
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)team_init,
    .tp_dealloc = (destructor)team_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = team_methods,
};

/* ---- functions ---- */

static PyObject *kernel_combine(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer target, source;
    int element, reduction;
    if (!PyArg_ParseTuple(arguments, "iiw*y*", &element, &reduction, &target, &source))
        return NULL;
    const bool fits = element >= 0 && element < N_ELEMENTS && reduction >= 0 && reduction < N_REDUCTIONS &&
                      target.len == source.len && (size_t)target.len % itemsize_of((enum element)element) == 0;
    if (fits) {
        const unsigned char *sources[2] = {target.buf, source.buf};
        unsigned char *targets[1] = {target.buf};
        const size_t count = (size_t)target.len / itemsize_of((enum element)element);
        Py_BEGIN_ALLOW_THREADS
        reduce_rows(sources, 2, targets, 1, count, (enum element)element, (enum reduction)reduction, 1.0);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&target);
    PyBuffer_Release(&source);
    if (fits)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "target and source must be of one element type and length");
    return NULL;
}

static PyObject *kernel_scale(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer target;
    int element;
    double factor;
    if (!PyArg_ParseTuple(arguments, "iw*d", &element, &target, &factor))
        return NULL;
    const bool fits = element >= FLOAT32 && element <= BFLOAT16 &&
                      (size_t)target.len % itemsize_of((enum element)element) == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        scale_row(target.buf, (size_t)target.len / itemsize_of((enum element)element), (enum element)element, factor);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&target);
    if (fits)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "only floats are scaled");
    return NULL;
}

/* Convert float32 to 16-bit floats or back; `element` is the 16-bit row's type. */
static PyObject *convert(PyObject *arguments, bool widens) {
    Py_buffer target, source;
    int element;
    if (!PyArg_ParseTuple(arguments, "iw*y*", &element, &target, &source))
        return NULL;
    const Py_buffer *narrow_row = widens ? &source : &target, *wide_row = widens ? &target : &source;
    const bool fits = (element == FLOAT16 || element == BFLOAT16) && wide_row->len == 2 * narrow_row->len;
    if (fits) {
        const size_t n = (size_t)narrow_row->len / 2;
        Py_BEGIN_ALLOW_THREADS
        if (widens)
            widen(target.buf, source.buf, n, (enum element)element);
        else
            narrow(target.buf, source.buf, n, (enum element)element);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&target);
    PyBuffer_Release(&source);
    if (fits)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "one row of 16-bit floats and one of as many float32");
    return NULL;
}

static PyObject *kernel_widen(PyObject *module, PyObject *arguments) {
    (void)module;
    return convert(arguments, true);
}

static PyObject *kernel_narrow(PyObject *module, PyObject *arguments) {
    (void)module;
    return convert(arguments, false);
}

static PyObject *kernel_team_bytes(PyObject *module, PyObject *arguments) {
    (void)module;
    int size;
    Py_ssize_t staging_bytes;
    if (!PyArg_ParseTuple(arguments, "in", &size, &staging_bytes))
        return NULL;
    return PyLong_FromSize_t(team_bytes(size, (size_t)staging_bytes));
}

static PyObject *kernel_spsc_queue_bytes(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_ssize_t slots, slot_bytes;
    if (!PyArg_ParseTuple(arguments, "nn", &slots, &slot_bytes))
        return NULL;
    return PyLong_FromSize_t(spsc_queue_bytes((size_t)slots, (size_t)slot_bytes));
}

static PyMethodDef functions[] = {
    {"combine", kernel_combine, METH_VARARGS, "combine(element, reduction, target, source): target op= source."},
    {"scale", kernel_scale, METH_VARARGS, "scale(element, target, factor): target *= factor, floats only."},
    {"widen", kernel_widen, METH_VARARGS, "widen(element, target, source): 16-bit floats into float32."},
    {"narrow", kernel_narrow, METH_VARARGS, "narrow(element, target, source): float32 into 16-bit floats."},
    {"team_bytes", kernel_team_bytes, METH_VARARGS, "team_bytes(size, staging_bytes): the bytes of a Team's memory."},
    {"spsc_queue_bytes", kernel_spsc_queue_bytes, METH_VARARGS,
     "spsc_queue_bytes(slots, slot_bytes): the bytes of a SpscQueue's memory."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernel", "Arithmetic on rows of memory; collectives and messages in shared memory.", -1,
    functions, NULL, NULL, NULL, NULL,
};

/* The table of flags.h as a read-only mapping. */
static PyObject *waiting_table(void) {
    const struct {
        const char *name;
        double value;
    } constants[] = {
        {"PATIENCE_SECONDS", PATIENCE_SECONDS},
        {"SLEEP_SECONDS", SLEEP_SECONDS},
        {"POLLS_A_SLEEP", POLLS_A_SLEEP},
        {"SUSPICION_SECONDS", SUSPICION_SECONDS},
        {"SLICE_SECONDS", SLICE_SECONDS},
        {"TAKEN_SECONDS", TAKEN_SECONDS},
        {"CROWDED_SLEEP_SECONDS", CROWDED_SLEEP_SECONDS},
        {"CROWDED_SLEEPS", CROWDED_SLEEPS},
        {"SPINS", SPINS},
        {"SPINS_CROWDED", SPINS_CROWDED},
        {"PROGRESS_SECONDS", PROGRESS_SECONDS},
    };
    PyObject *table = PyDict_New();
    if (table == NULL)
        return NULL;
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) {
        PyObject *value = PyFloat_FromDouble(constants[i].value);
        const int failed = value == NULL ? -1 : PyDict_SetItemString(table, constants[i].name, value);
        Py_XDECREF(value);
        if (failed < 0) {
            Py_DECREF(table);
            return NULL;
        }
    }
    PyObject *proxy = PyDictProxy_New(table);
    Py_DECREF(table);
    return proxy;
}

static int add_waiting(PyObject *module) {
    PyObject *table = waiting_table();
    const int failed = table == NULL ? -1 : PyModule_AddObjectRef(module, "WAITING", table);
    Py_XDECREF(table);
    return failed;
}

PyMODINIT_FUNC PyInit__kernel(void) {
    if (PyType_Ready(&TeamType) < 0 || PyType_Ready(&OperationType) < 0 || PyType_Ready(&SpscQueueType) < 0)
        return NULL;
    /* An operation is one step of the team, so it never waits in a queue of requests (executors/request.py). */
    if (PyDict_SetItemString(OperationType.tp_dict, "queued", Py_False) < 0)
        return NULL;
    PyType_Modified(&OperationType);
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    if (PyModule_AddObjectRef(module, "Team", (PyObject *)&TeamType) < 0 ||
        PyModule_AddObjectRef(module, "Operation", (PyObject *)&OperationType) < 0 ||
        PyModule_AddObjectRef(module, "SpscQueue", (PyObject *)&SpscQueueType) < 0 ||
        add_waiting(module) < 0 || PyModule_AddIntConstant(module, "MOST_RANKS", MOST_ROWS) < 0 ||
        PyModule_AddStringConstant(module, "SOURCE_HASH", MPILLM_SOURCE_HASH) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
