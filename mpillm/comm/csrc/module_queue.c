/* The Python type of spsc_queue.c. */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <math.h>
#include <stdint.h>

#include "flags.h"
#include "module.h"
#include "spsc_queue.h"

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    struct spsc_queue queue;
    int sends;
    bool busy; /* a thread copies or waits without the GIL; read and written with the GIL held */
    int peer_rank;
    int peer_process;
    unsigned spins;
    PyObject *error;
} SpscQueue;

static int spsc_queue_init(SpscQueue *self, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"memory",    "slots",        "slot_bytes", "sends",
                            "peer_rank", "peer_process", "spins",      "error", NULL};
    Py_ssize_t slots, slot_bytes;
    if (self->memory.obj != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "a queue is initialized once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "w*nnpiiIO", names, &self->memory, &slots, &slot_bytes,
                                     &self->sends, &self->peer_rank, &self->peer_process, &self->spins, &self->error))
        return -1;
    Py_INCREF(self->error);
    self->queue.memory = self->memory.buf;
    self->queue.slots = (size_t)slots;
    self->queue.slot_bytes = (size_t)slot_bytes;
    if (slots < 1 || slot_bytes < 0 || (uintptr_t)self->memory.buf % sizeof(uint64_t) != 0 ||
        (size_t)self->memory.len < spsc_queue_bytes((size_t)slots, (size_t)slot_bytes)) {
        PyErr_SetString(PyExc_ValueError, "a queue's slots and its memory must fit each other");
        return -1;
    }
    return 0;
}

static void spsc_queue_dealloc(SpscQueue *self) {
    if (self->memory.obj != NULL)
        PyBuffer_Release(&self->memory);
    Py_XDECREF(self->error);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* ---- one call ---- */

typedef struct {
    SpscQueue *self;
    Py_buffer buffer;
    struct receipt receipt;
    bool fits;
} Call;

/* Parse the arguments (buffer, limit_seconds) of a send or a receive, and mark the queue busy. */
static bool begin(SpscQueue *self, PyObject *arguments, bool sends, Call *call, double *limit_seconds) {
    *limit_seconds = INFINITY;
    if (self->memory.obj == NULL || sends != (bool)self->sends || self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "a queue sends or receives, as it was made to, in one thread at a time");
        return false;
    }
    if (!PyArg_ParseTuple(arguments, sends ? "y*|d" : "w*|d", &call->buffer, limit_seconds))
        return false;
    call->self = self;
    call->receipt = (struct receipt){call->buffer.buf, (size_t)call->buffer.len, 0};
    call->fits = !sends || (size_t)call->buffer.len <= self->queue.slot_bytes;
    self->busy = true;
    return true;
}

/* Mark the queue free. Return True, False, or NULL with the exception of a failure or a length. */
static PyObject *end(Call *call, int done) {
    SpscQueue *self = call->self;
    const Py_ssize_t nbytes = call->buffer.len;
    PyBuffer_Release(&call->buffer);
    self->busy = false;
    if (done < 0)
        return NULL;
    if (call->fits)
        return PyBool_FromLong(done);
    if (self->sends)
        PyErr_Format(self->error, "a message of %zd bytes to rank %d is longer than the %zu of a slot", nbytes,
                     self->peer_rank, self->queue.slot_bytes);
    else
        PyErr_Format(self->error,
                     "rank %d sent a message of %zu bytes, the array for it holds %zd; both ends must agree on lengths",
                     self->peer_rank, message_bytes(&self->queue), nbytes);
    return NULL;
}

/* Is the call done: sent, received, or found impossible? `*moved`: part of a message was copied. */
static bool try_once(Call *call, bool *moved) {
    struct spsc_queue *queue = &call->self->queue;
    *moved = false;
    if (call->self->sends) {
        if (call->fits && !has_free_slot(queue))
            return false;
        if (call->fits)
            enqueue(queue, call->receipt.target, call->receipt.nbytes);
        return true;
    }
    const enum outcome outcome = dequeue(queue, &call->receipt);
    *moved = outcome == SOME;
    call->fits = outcome != ANOTHER_LENGTH;
    return outcome == WHOLE || !call->fits;
}

static bool keep_trying(void *waiting, double limit_seconds) {
    Call *call = waiting;
    struct patience patience = {0};
    bool moved;
    while (!try_once(call, &moved)) {
        if (moved)
            patience.waited = 0;
        else if (!be_patient(&patience, call->self->spins, limit_seconds))
            return false;
    }
    return true;
}

/* Raise the queue's error where the peer has ended, unless what it left lets the call succeed. */
static bool may_come(const SpscQueue *self) {
    if (!is_gone((pid_t)self->peer_process) || (self->sends ? has_free_slot(&self->queue) : has_arrived(&self->queue)))
        return true;
    PyErr_Format(self->error,
                 "rank %d (process %d) has died while this rank waited %s; see its output for the reason, a checkpoint "
                 "resumes the run",
                 self->peer_rank, self->peer_process, self->sends ? "to send it a message" : "for its message");
    return false;
}

static bool call_may_succeed(void *waiting) { return may_come(((Call *)waiting)->self); }

/* ---- methods ---- */

static PyObject *attempt(SpscQueue *self, PyObject *arguments, bool sends) {
    Call call;
    double unused;
    if (!begin(self, arguments, sends, &call, &unused))
        return NULL;
    /* A long message is copied without the GIL; a queue with nothing to do is not worth releasing it. */
    bool done = false, moved;
    if (sends ? has_free_slot(&self->queue) || !call.fits : has_arrived(&self->queue)) {
        Py_BEGIN_ALLOW_THREADS
        done = try_once(&call, &moved);
        Py_END_ALLOW_THREADS
    }
    return end(&call, done);
}

static PyObject *wait(SpscQueue *self, PyObject *arguments, bool sends) {
    Call call;
    double limit_seconds;
    if (!begin(self, arguments, sends, &call, &limit_seconds))
        return NULL;
    return end(&call, wait_for(&call, keep_trying, call_may_succeed, limit_seconds));
}

static PyObject *spsc_queue_try_send(SpscQueue *self, PyObject *arguments) { return attempt(self, arguments, true); }

static PyObject *spsc_queue_try_receive(SpscQueue *self, PyObject *arguments) { return attempt(self, arguments, false); }

static PyObject *spsc_queue_send(SpscQueue *self, PyObject *arguments) { return wait(self, arguments, true); }

static PyObject *spsc_queue_receive(SpscQueue *self, PyObject *arguments) { return wait(self, arguments, false); }

static PyObject *spsc_queue_check(SpscQueue *self, PyObject *unused) {
    (void)unused;
    if (self->memory.obj != NULL && !may_come(self))
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef spsc_queue_methods[] = {
    {"try_send", (PyCFunction)spsc_queue_try_send, METH_VARARGS,
     "try_send(buffer): copy it into a slot; False: no slot is free."},
    {"send", (PyCFunction)spsc_queue_send, METH_VARARGS,
     "send(buffer, limit_seconds=inf): the same, waiting for a slot; False: the limit has passed."},
    {"try_receive", (PyCFunction)spsc_queue_try_receive, METH_VARARGS,
     "try_receive(buffer): fill it with the oldest message; False: no message has arrived."},
    {"receive", (PyCFunction)spsc_queue_receive, METH_VARARGS,
     "receive(buffer, limit_seconds=inf): the same, waiting for it; False: the limit has passed."},
    {"check", (PyCFunction)spsc_queue_check, METH_NOARGS,
     "Raise the error where the peer has ended and this end would wait without end."},
    {NULL, NULL, 0, NULL},
};

PyTypeObject SpscQueueType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "mpillm.comm.kernel.SpscQueue",
    .tp_doc = "SpscQueue(memory, slots, slot_bytes, sends, peer_rank, peer_process, spins, error): one end of a queue.",
    .tp_basicsize = sizeof(SpscQueue),
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)spsc_queue_init,
    .tp_dealloc = (destructor)spsc_queue_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = spsc_queue_methods,
};
